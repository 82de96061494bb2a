"""Runs about given pictures: subjects, reading, objects that move; and that each method draws or says why not."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

import attnctrl as ac
from attnctrl.cli import main
from attnctrl.errors import ControlError
from attnctrl.fields import of_tasks
from attnctrl.pipelines import ReadoutPipeline, SubjectsPipeline
from attnctrl.ui.desk import Desk
from attnctrl.ui.edit_tab import read_moves
from attnctrl.ui.examples import edit_example, read_example, subjects_example
from attnctrl.ui.given import ELSEWHERE
from attnctrl.ui.jobs import Progress
from attnctrl.ui.reading import center, labels_of
from attnctrl.ui.request import TASKS, Move, Place, Request, Sitter
from attnctrl.ui.snippets import command, python
from attnctrl.ui.subjects_tab import read_slots
from tests.ui.parts import backend, drawn, same

FEW = {"steps": 2, "seed": 1}


@pytest.fixture
def desk() -> Desk:
    return Desk(backend())


def subjects() -> tuple[list[Image.Image], Request]:
    pictures, asked = subjects_example()
    return pictures, replace(asked, methods={"region-mask": {}, "magic-face": {}}, **FEW)


def test_subjects_are_those_of_the_library_its_program_and_its_command(
    desk: Desk, tmp_path: Path, monkeypatch: Any
) -> None:
    pictures, asked = subjects()
    steps: list[Progress] = []
    result = drawn(desk, asked, each=steps.append, pictures=pictures)
    given = [
        ac.Subject(one.phrase, picture, region=place.region())
        for one, picture, place in zip(asked.subjects, pictures, asked.regions, strict=True)
    ]
    expected = SubjectsPipeline(backend().pipe)(
        asked.prompt, given, method=["region-mask", "magic-face"], num_inference_steps=2, guidance=3.5, seed=1
    )
    assert same(result.controlled, expected.images[0])
    assert not same(result.controlled, result.stock)
    assert same(result.stock, drawn(desk, Request(prompt=asked.prompt, guidance=3.5, **FEW)).stock)
    assert [name for _, name in result.overlays][-2:] == ["reference: a circle", "reference: a square"]
    assert "MagicFace" in result.report
    assert {one.what for one in steps} == {"controlled picture", "stock picture"}
    monkeypatch.chdir(tmp_path)
    for number, picture in enumerate(pictures):
        picture.save(f"picture{number}.png")
    exec(python(asked, "shapes-sd"), {})
    assert same(Image.open("picture.png"), result.controlled)
    assert main([*shlex.split(command(asked, "shapes-sd"))[1:], "--force"]) == 0
    assert same(Image.open("picture.png"), result.controlled)


def test_a_subject_of_no_strength_takes_no_part(desk: Desk) -> None:
    pictures, asked = subjects()
    absent = replace(asked, subjects=tuple(replace(one, strength=0.0) for one in asked.subjects), methods={})
    result = drawn(desk, absent, pictures=pictures)
    assert same(result.controlled, result.stock)


@pytest.mark.parametrize(
    ("change", "count", "sentence"),
    [
        ({"subjects": ()}, 2, "there are no subjects"),
        ({}, 1, "the subjects have 2 pictures, and 1 are given"),
        ({"regions": (Place("ground", (0.0, 0.0, 1.0, 1.0)),)}, 2, 'a region is for "ground", which is no subject'),
        ({"regions": (Place("a circle", (0.0, 0.0, 1.0, 1.0)),) * 2}, 2, 'there are two regions for "a circle"'),
        ({"subjects": (Sitter("a cat", 2),), "regions": ()}, 2, 'the phrase "a cat" is not in the prompt'),
        ({"noise": "much"}, 2, 'reference_noise is "much"'),
    ],
)
def test_subjects_that_cannot_be_drawn_say_why(desk: Desk, change: dict[str, Any], count: int, sentence: str) -> None:
    pictures, asked = subjects()
    with pytest.raises(ControlError) as caught:
        drawn(desk, replace(asked, **change), pictures=pictures[:count])
    assert sentence in str(caught.value)


def test_fields_of_subjects_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (16, 16)).save(path)
    sitters, pictures = read_slots([[None, "", 1.0], [[str(path)] * 2, " a cat ", 0.5], [None, " ", 1.0]])
    assert sitters == [{"phrase": "a cat", "pictures": 2, "strength": 0.5}]
    assert len(pictures) == 2
    for slot, sentence in (([None, "cat", 1.0], "subject 1 has no picture"), ([[str(path)], "", 1.0], "has no words")):
        with pytest.raises(ControlError, match=sentence):
            read_slots([slot])


def test_words_are_found_in_a_given_picture(desk: Desk, tmp_path: Path, monkeypatch: Any) -> None:
    pictures, asked = read_example()
    asked = replace(asked, steps=4)
    result = drawn(desk, asked, pictures=pictures[:1])
    assert [phrase for _, phrase in result.overlays] == ["red circle", "blue square"]
    mask = np.asarray(result.overlays[0][0]) > 127
    there = Image.new("L", (128, 128))
    there.paste(255, (18, 24, 59, 66))
    inside = np.asarray(there) > 127
    assert (mask & inside).sum() > 0.5 * mask.sum(), "the mask is of what is at the circle"
    monkeypatch.chdir(tmp_path)
    pictures[0].save("picture0.png")
    exec(python(asked, "shapes-sd"), {})
    assert same(Image.open("mask-0.png"), result.overlays[0][0])
    with pytest.raises(ControlError, match="no command for reading given pictures"):
        command(asked, "shapes-sd")


@pytest.mark.parametrize("name", ["correspond", "segment-like-me"])
def test_an_example_is_found_in_another_picture(desk: Desk, name: str, tmp_path: Path, monkeypatch: Any) -> None:
    pictures, asked = read_example()
    asked = replace(asked, methods={name: {"iterations": 1}}, phrases=(), steps=3)
    result = drawn(desk, asked, pictures=pictures)
    reader = ReadoutPipeline(backend().pipe)
    if name == "correspond":
        x, y = reader.correspond(pictures[0], center(asked), pictures[1], iterations=1, steps=3)
        assert f"is ({x:.3f}, {y:.3f}) in the other picture" in result.report
    else:
        given = {"iterations": 1, "steps": 3}
        parts = reader.learn(pictures[0], labels_of(asked, (128, 128)), **given)
        expected = reader.segment_like(pictures[1], parts, **given)[0].numpy()
        masks = {phrase: np.asarray(mask) > 0 for mask, phrase in result.overlays}
        assert np.array_equal(masks.get("circle", np.zeros((128, 128), bool)), expected == 1)
    monkeypatch.chdir(tmp_path)
    for number, picture in enumerate(pictures):
        picture.save(f"picture{number}.png")
    exec(python(asked, "shapes-sd"), {})


def test_regions_are_labels_and_points() -> None:
    asked = Request(
        regions=(
            Place("a", (0.0, 0.0, 0.5, 0.5)),
            Place("b", (0.25, 0.25, 0.5, 0.5)),
            Place("a", (0.75, 0.75, 1.0, 1.0)),
        )
    )
    assert labels_of(asked, (4, 4)).tolist() == [[1, 1, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert center(asked) == (0.25, 0.25)
    assert center(Request(regions=(Place("a", polygon=((0.0, 0.5), (1.0, 0.0), (0.5, 1.0))),))) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("change", "count", "sentence"),
    [
        ({"methods": {}}, 1, "reading takes one method"),
        ({"methods": {"segment": {}, "correspond": {}}}, 1, "reading takes one method"),
        ({}, 2, "segment takes 1 picture, and 2 are given"),
        ({"methods": {"correspond": {}}}, 1, "correspond takes 2 pictures, and 1 are given"),
        ({"methods": {"correspond": {}}, "regions": ()}, 2, "needs a region around the point"),
        ({"methods": {"segment-like-me": {}}, "regions": ()}, 2, "needs a region around each part"),
        ({"phrases": ("green star",)}, 1, '"green star"'),
    ],
)
def test_what_cannot_be_read_says_why(desk: Desk, change: dict[str, Any], count: int, sentence: str) -> None:
    pictures, asked = read_example()
    with pytest.raises(ControlError) as caught:
        drawn(desk, replace(asked, **change), pictures=pictures[:count])
    assert sentence in str(caught.value)


def test_pictures_of_no_whole_latents_are_refused_by_name(desk: Desk) -> None:
    pictures, asked = read_example()
    with pytest.raises(ControlError, match="100x128"):
        drawn(desk, asked, pictures=[pictures[0].crop((0, 0, 100, 128))])
    with pytest.raises(ControlError, match="give one of at most 2048 on a side"):
        drawn(desk, asked, pictures=[ImageOps.expand(pictures[0], 1024)])


@pytest.mark.parametrize("name", [m.name for m in of_tasks(*TASKS["edit"])])
def test_every_method_of_the_edit_tab_edits_or_says_why_not(desk: Desk, name: str) -> None:
    picture, asked = edit_example()
    asked = replace(asked, methods={name: {}}, **FEW)
    if name == "design-edit":
        asked = replace(asked, edits=(), moves=(Move("blue square", -0.25, 0.0),))
    if name in ELSEWHERE:
        with pytest.raises(ControlError, match=r"use attnctrl\.pipelines\."):
            drawn(desk, asked, pictures=[picture])
        return
    result = drawn(desk, asked, pictures=[picture])
    assert result.controlled.size == picture.size
    assert result.report.strip(), "it acted"
    if "regions" in ac.controls.method(name).settings:
        with pytest.raises(ControlError, match=f"{name} keeps to regions"):
            drawn(desk, replace(asked, regions=()), pictures=[picture])


def test_an_object_moves_with_its_program(desk: Desk, tmp_path: Path, monkeypatch: Any) -> None:
    picture, asked = edit_example()
    moved = replace(asked, edits=(), moves=(Move("blue square", -0.25, 0.0),), methods={"design-edit": {}}, **FEW)
    result = drawn(desk, moved, pictures=[picture])
    outside = (slice(0, 40), slice(None))
    assert np.array_equal(np.asarray(result.controlled)[outside], np.asarray(picture)[outside])
    assert not same(result.controlled, picture)
    monkeypatch.chdir(tmp_path)
    picture.save("given.png")
    exec(python(moved, "shapes-sd"), {})
    assert same(Image.open("edited.png"), result.controlled)
    for change, sentence in (
        ({"methods": {}}, "objects are moved by design-edit"),
        ({"moves": ()}, "design-edit moves objects: draw a region"),
        ({"regions": ()}, 'there is no region for "blue square", which is to move'),
    ):
        with pytest.raises(ControlError) as caught:
            drawn(desk, replace(moved, **change), pictures=[picture])
        assert sentence in str(caught.value)


def test_moves_are_read_line_by_line() -> None:
    assert read_moves("red circle = 0.3, -0.1\n\n blue square=0,0.5 , 2\nstar = remove") == [
        {"phrase": "red circle", "dx": 0.3, "dy": -0.1},
        {"phrase": "blue square", "dx": 0.0, "dy": 0.5, "resize": 2.0},
        {"phrase": "star", "remove": True},
    ]
    for line in ("red circle", "= 1, 2", "star = 1", "star = a, b", "star = 1, 2, 3, 4"):
        with pytest.raises(ControlError, match="write words = right, down"):
            read_moves(line)
