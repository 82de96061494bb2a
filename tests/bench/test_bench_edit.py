"""The tasks of `bench edit`, their scores on pictures whose right answer is known, and its rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import attnctrl as ac
from attnctrl.bench import edit
from attnctrl.bench.draw import Settings
from attnctrl.bench.edit import INSTRUCT_METHODS, METHODS, instructed, parse_kinds
from attnctrl.bench.edit_score import MARGIN, coloured, edited_share, grown, kept_share, score_edit, spilled, toward
from attnctrl.bench.edit_tasks import KINDS, EditTask, make_edits
from attnctrl.bench.edit_ways import parse_instruct_ways, parse_ways
from attnctrl.bench.likeness import psnr
from attnctrl.bench.tasks import fitted
from attnctrl.edits import edited
from attnctrl.shapes import models
from attnctrl.shapes.detect import detect
from attnctrl.shapes.instructions import instruction_for
from attnctrl.shapes.pretrained import assemble_instruct
from attnctrl.shapes.render import render
from attnctrl.shapes.world import HELD_OUT, Scene
from tests import tiny


def pixels(picture) -> np.ndarray:
    return np.asarray(picture, dtype=np.float64) / 255


def wanted(task: EditTask) -> np.ndarray:
    """What was asked, drawn exactly."""
    things = [fitted(*pair, box) for pair, box in zip(task.wanted, task.places, strict=True) if pair is not None]
    return render([Scene(tuple(things), task.background)])[0].permute(1, 2, 0).double().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_picture_scores_full_marks_and_the_given_one_is_not_edited(kind: str) -> None:
    for task in make_edits(kind, 6):
        right, given = score_edit(task, wanted(task)), score_edit(task, pixels(task.picture))
        assert right["edited"] == right["kept"] == 1.0
        assert right["background_psnr"] > 40
        assert right["max_error"] < 0.02
        assert right.get("leak_out", 0.0) == given.get("leak_out", 0.0) == 0.0
        assert max(right.get("leak_in", 0.0), given.get("leak_in", 0.0)) < 0.01
        assert given["edited"] == 0.0
        assert given["kept"] == 1.0
        assert given["background_psnr"] == 60.0


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_edits_agree(kind: str) -> None:
    for task in make_edits(kind, 6):
        assert all((colour, shape) not in HELD_OUT for shape, colour in filter(None, task.wanted))
        if kind == "move":
            assert task.target_prompt == task.layout.prompt
        elif kind != "remove":
            # Only an article may differ: "a" or "an" of another colour.
            made = edited(task.layout.prompt, task.edits)
            assert made.replace(" an ", " a ").lstrip("an ") == task.target_prompt.replace(" an ", " a ").lstrip("an ")
    splits = [{t.layout.prompt for t in make_edits(kind, 12, split)} for split in ("tune", "test")]
    assert not splits[0] & splits[1]


def test_tasks_do_not_depend_on_how_many_there_are() -> None:
    few, many = make_edits("two", 2), make_edits("two", 5)
    assert [t.seed for t in few] == [t.seed for t in many[:2]]
    assert [t.target_prompt for t in few] == [t.target_prompt for t in many[:2]]


def test_an_object_that_moved_is_not_kept() -> None:
    task = make_edits("recolour", 1)[0]
    stays = next(i for i in range(len(task.wanted)) if i not in task.changed)
    things = [fitted(*thing) for thing in task.layout.things]
    moved = replace(things[stays], cx=things[stays].cx + 0.08)
    things[stays] = moved
    found = detect(render([Scene(tuple(things), task.background)])[0].numpy())
    assert kept_share(task, found) == pytest.approx(0.5)
    assert edited_share(task, found) == 0.0


def test_a_moved_object_must_be_there_and_its_old_place_empty() -> None:
    for task in make_edits("move", 4):
        (i,) = task.moved
        shape, colour, old = task.layout.things[i]
        stay = [fitted(*thing) for n, thing in enumerate(task.layout.things) if n != i]

        def share(*things, task=task, stay=stay) -> float:
            return edited_share(task, detect(render([Scene((*stay, *things), task.background)])[0].numpy()))

        there = fitted(shape, colour, task.moved[i])
        assert share(there) == 1.0
        assert share(there, fitted(shape, colour, old)) == 0.0
        assert share(there, fitted("ring" if shape != "ring" else "star", colour, old)) == 0.0
        assert share() == 0.0
        assert share(replace(there, cx=there.cx + (0.09 if there.cx < 0.5 else -0.09))) == 0.0


def test_layers_of_moves_and_removals() -> None:
    for task in make_edits("move", 4):
        (layer,), (i,) = task.layers, task.moved
        x0, y0, x1, y1 = task.layout.boxes[i]
        ys, xs = np.nonzero(layer.mask)
        assert (x0 * 128 - 1, y0 * 128 - 1) <= (xs.min(), ys.min())
        assert (xs.max(), ys.max()) <= (x1 * 128 + 1, y1 * 128 + 1)
        assert task.moved[i][0] == pytest.approx(x0 + layer.dx)
        assert task.moved[i][1] == pytest.approx(y0 + layer.dy)
        assert task.layout.phrases[i] not in task.rest_prompt
        assert len(task.edits) == 0
    task = make_edits("remove", 1)[0]
    assert task.layers[0].remove
    assert task.rest_prompt == task.target_prompt


def test_who_can_move_objects() -> None:
    pipe, settings = tiny.sd(), Settings(steps=2)
    move, recolour = make_edits("move", 1)[0], make_edits("recolour", 1)[0]
    ways = parse_ways("none@direct,img2img,design-edit@direct,design-edit@direct:mask")
    for way in ways[:2]:
        with pytest.raises(ac.ControlError, match="cannot move an object"):
            edit.edit(pipe, move, way, settings)
    with pytest.raises(ac.ControlError, match="moves and removes what has a mask"):
        edit.edit(pipe, move, ways[2], settings)
    with pytest.raises(ac.ControlError, match="is not for this edit"):
        edit.edit(pipe, recolour, ways[3], settings)


def test_edits_that_exchange_their_colours_leak() -> None:
    for task in make_edits("two", 4):
        first, second = task.order
        pairs = list(task.wanted)
        (shape, colour), (other_shape, other_colour) = pairs[first], pairs[second]
        pairs[first], pairs[second] = (shape, other_colour), (other_shape, colour)
        assert score_edit(task, wanted(replace(task, wanted=tuple(pairs))))["leak_in"] > 0.15


def test_measures_by_hand() -> None:
    black, grey = np.zeros((4, 4, 3)), np.full((4, 4, 3), 0.1)
    everywhere = np.ones((4, 4), bool)
    assert psnr(black, grey, everywhere) == pytest.approx(20.0)
    assert psnr(grey, grey, everywhere) == 60.0
    red = np.zeros((4, 4, 3))
    red[:2] = (0.86, 0.15, 0.15)
    assert toward(red, black, "red", everywhere) == 0.5
    assert np.array_equal(coloured(red, "red"), red[..., 0] > 0)
    assert np.array_equal(coloured(red, "black"), red[..., 0] == 0)
    assert not coloured(red + 0.1, "red").any()
    assert spilled(red, black, "red", everywhere) == 0.5
    assert spilled(red, red, "red", everywhere) == 0.0
    dot = np.zeros((128, 128), bool)
    dot[64, 64] = True
    assert grown(dot, MARGIN).sum() == (2 * MARGIN + 1) ** 2


def test_rows_are_written_as_method_inversion_and_mask() -> None:
    ways = parse_ways("img2img, img2img{strength=0.5|1},none@direct,prompt-to-prompt{self_until=0.1|0.2}@virtual:mask")
    assert [w.strength for w in ways[:3]] == [0.7, 0.5, 1.0]
    assert [(w.label, w.inversion, w.masked) for w in ways] == [
        ("img2img", None, False),
        ("img2img{strength=0.5}", None, False),
        ("img2img{strength=1}", None, False),
        ("none@direct", "direct", False),
        ("prompt-to-prompt{self_until=0.1}@virtual:mask", "virtual", True),
        ("prompt-to-prompt{self_until=0.2}@virtual:mask", "virtual", True),
    ]
    assert len(parse_ways(METHODS)) > 10
    with pytest.raises(ac.ControlError, match="names no inversion"):
        parse_ways("prompt-to-prompt")
    with pytest.raises(ac.ControlError, match='inversion "magic" is unknown'):
        parse_ways("none@magic")
    for strength in ("0", "1.5", "nan", "much"):
        with pytest.raises(ac.ControlError, match="is no part of the run"):
            parse_ways(f"img2img{{strength={strength}}}")


def test_rows_for_instructions() -> None:
    ways = parse_instruct_ways("none,lime:mask,focus-on-instruction{separate=true}")
    assert [(w.label, w.inversion, w.masked) for w in ways] == [
        ("none", None, False),
        ("lime:mask", None, True),
        ("focus-on-instruction{separate=true}", None, False),
    ]
    assert len(parse_instruct_ways(INSTRUCT_METHODS)) == 8
    with pytest.raises(ac.ControlError, match='method "magic" is unknown'):
        parse_instruct_ways("magic")


def test_kinds_of_the_command_line() -> None:
    assert parse_kinds("two, move,two") == ("two", "move")
    with pytest.raises(ac.ControlError, match='kind "turn" are not known: choose of recolour'):
        parse_kinds("two,turn")


@pytest.mark.slow
def test_every_kind_but_moves_can_be_told_as_an_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an untrained model, for every method: what is measured is that words, masks and sizes fit."""
    torch.manual_seed(0)
    pipe = assemble_instruct(models.denoiser(in_channels=8).eval(), models.scheduler())
    pipe.set_progress_bar_config(disable=True)
    assert instructed(pipe)
    told = []
    monkeypatch.setattr(edit, "instruction_for", lambda parts: told.append(parts) or instruction_for(parts))
    methods = "none,focus-on-instruction{separate=true},focus-on-instruction:mask,lime:mask"
    for kind in KINDS:
        (task,) = make_edits(kind, 1)
        if kind == "move":  # the world has no words for places
            with pytest.raises(ac.ControlError, match="cannot move an object"):
                edit.edit(pipe, task, parse_instruct_ways("none")[0], Settings(steps=3))
            continue
        for way in parse_instruct_ways(methods if kind in ("two", "remove") else "none"):
            drawn = edit.edit(pipe, task, way, Settings(steps=3))
            assert drawn.size == (128, 128)
        assert [source for source, _ in told[-1]] == [one.source for one in task.edits]
        assert all(target for _, target in told[-1])
