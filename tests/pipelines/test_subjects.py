"""SubjectsPipeline, its command, and its bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import attnctrl as ac
from attnctrl.bench.draw import Settings
from attnctrl.bench.memory import peak_bytes
from attnctrl.bench.methods import parse_methods
from attnctrl.bench.results import Results
from attnctrl.bench.subject_score import difference, score_subjects
from attnctrl.bench.subject_tasks import make_subject_tasks
from attnctrl.bench.subjects import METHODS, PLAIN, TABLE, Way, draw_subjects, measure, parse_ways
from attnctrl.cli import main
from attnctrl.commands.subjects import parse_subjects
from attnctrl.pipelines import SubjectsPipeline
from attnctrl.pipelines import subjects as pipelines_subjects
from attnctrl.pipelines.subjects import NOISES
from attnctrl.shapes.detect import detect
from attnctrl.shapes.render import render
from attnctrl.shapes.world import Scene, Thing
from attnctrl.words import Word
from tests import tiny
from tests.subjects.material import LEFT, PROMPT, middle, picture, two

FEW: dict[str, Any] = {"num_inference_steps": 3, "seed": 4, "record": False}


def drawn(subjects: Any, **params: Any) -> np.ndarray:
    result = SubjectsPipeline(tiny.sd())(PROMPT, subjects, **{**FEW, **params})
    return np.asarray(result.images[0])


def test_without_methods_it_is_the_stock_picture() -> None:
    pipe = tiny.sd()
    seeds = [torch.Generator().manual_seed(4)]
    stock = np.asarray(pipe([PROMPT], num_inference_steps=3, generator=seeds).images[0])
    assert (drawn((), method="none") == stock).all()
    assert (drawn(two(strength=0.0)) == stock).all()
    assert not (drawn(two()) == stock).all()


@pytest.mark.parametrize("noise", NOISES)
def test_references_are_drawn_along(noise: str) -> None:
    scheduler = (pipe := tiny.sd("dpm")).scheduler
    result = SubjectsPipeline(pipe)(PROMPT, two(), reference_noise=noise, num_images_per_prompt=2, **FEW)
    assert len(result.images) == len(result.references) == 2
    assert pipe.scheduler is scheduler
    assert not (np.asarray(result.images[0]) == np.asarray(result.images[1])).all()


def test_exchanged_pictures_and_regions_matter() -> None:
    cat, dog = two()
    exchanged = (
        ac.Subject("cat", dog.image, dog.mask, cat.region),
        ac.Subject("dog", cat.image, cat.mask, dog.region),
    )
    one, other = drawn((cat, dog)), drawn(exchanged)
    assert not (one == other).all()


def test_rows_are_drawn_for_methods_that_look_at_them() -> None:
    pipeline = SubjectsPipeline(tiny.sd())
    for method, rows in (
        ("masked-adain", 0),
        (["region-mask", "masked-adain"], 0),
        (["masked-adain", "magic-face"], 2),
    ):
        assert len(pipeline(PROMPT, two(), method=method, **FEW).references) == rows
    assert not (drawn(two(), method="masked-adain") == drawn((), method="none")).all()


def test_a_set_of_prompts_and_methods_of_layout() -> None:
    pipeline = SubjectsPipeline(tiny.sd())
    result = pipeline([PROMPT, "a red cat and a dog"], two(), method=["region-mask", "magic-face"], bias=1.0, **FEW)
    assert len(result.images) == 2
    assert {row.control for row in result.run.report.rows.values()} == {"DrawReferences", "RegionMask", "MagicFace"}
    assert pipeline.methods == [
        "magic-face",
        "isolation-reposition",
        "appearance-matching",
        "consistent-self-attention",
        "shared-attention",
        "delayed-subject",
        "masked-reference",
        "time-aware-reference",
        "object-masks",
        "in-context-mask",
        "localized-residual",
        "masked-adain",
        "persona-hoi",
    ]


def test_a_persona_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are learned for it; the prompt's first picture is the plain one, whatever they are."""
    found = {}
    for size in (1.0, 5.0):
        words = {subject.phrase: Word(torch.linspace(-size, size, 16)) for subject in two()}
        monkeypatch.setattr(pipelines_subjects, "words_for", lambda *args, words=words: words)
        result = SubjectsPipeline(tiny.sd())([PROMPT] * 2, two(), method="persona-hoi", **FEW)
        found[size] = [np.asarray(image) for image in result.images]
    assert (found[1.0][0] == found[5.0][0]).all()
    assert not (found[1.0][1] == found[1.0][0]).all()
    assert not (found[1.0][1] == found[5.0][1]).all()


def test_bad_input_is_a_sentence() -> None:
    for given, sentence in (
        ({"reference_noise": "some"}, "choose one of one, fresh, inversion"),
        ({"words": "guessed"}, "choose one of learned, found"),
        ({"method": "draft"}, "belongs to the task sparse, not to subjects or layout"),
        ({"method": "magic-face", "base": 1}, "is no parameter of magic-face"),
        ({"noise_scale": 2.0}, "noise_scale is 2.0"),
    ):
        with pytest.raises(ac.ControlError, match=sentence):
            drawn(two(), **given)
    with pytest.raises(ac.ControlError, match='"bird" is not in the prompt'):
        drawn([ac.Subject("bird", picture(1))])


def test_subjects_of_the_command_line(tmp_path: Path) -> None:
    for name in ("one", "two"):
        picture(1).save(tmp_path / f"{name}.png")
    Image.fromarray(middle()).save(tmp_path / "mask.png")
    one, two_, mask = (str(tmp_path / f"{name}.png") for name in ("one", "two", "mask"))
    subjects = parse_subjects([f"a cat={one}@0,0,0.5,1", f"a dog={one}", f"a dog={two_}"], [mask] * 3)
    assert [s.phrase for s in subjects] == ["a cat", "a dog"]
    assert subjects[0].region == (0, 0, 0.5, 1)
    assert len(subjects[1].references) == 2
    for texts, masks, sentence in (
        (["a cat"], [], "write phrase=file"),
        ([f"a cat={one}@left"], [], "four numbers"),
        ([f"a cat={one}", f"a dog={one}"], [mask], "one for each"),
    ):
        with pytest.raises(ac.ControlError, match=sentence):
            parse_subjects(texts, masks)


def test_the_command_says_which_word_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (task,) = make_subject_tasks(1, 1, "tune")
    (subject,) = task.subjects(False)
    reference = subject.references[0]
    reference.picture.save(tmp_path / "it.png")
    colour = task.layout.asked[0][1]
    other = "green" if colour != "green" else "blue"
    line = ["subjects", "--prompt", task.prompt, "--subject", f"{subject.phrase}={tmp_path / 'it.png'}"]
    line += ["--method", "delayed-subject", "--words", "found", "--among", f"{other}, {colour}", "--steps", "2"]
    assert main([*line, "--out", str(tmp_path / "out.png")]) == 0
    assert f'{subject.phrase}: found "{colour}"' in capsys.readouterr().out


def test_tasks_leave_the_colours_to_the_references() -> None:
    for task in make_subject_tasks(2, 4):
        assert not any(colour in task.prompt for _, colour in task.layout.asked)
        for subject, view, (shape, colour) in zip(task.subjects(False), task.views, task.layout.asked, strict=True):
            assert (view.things[0].shape, view.things[0].colour) == (shape, colour)
            assert [o.colour for o in detect(subject.references[0].picture).objects] == [colour]
            assert subject.phrase in task.prompt
    one, passed = make_subject_tasks(3, 2)
    assert one.prompt == passed.prompt
    assert one.seed == passed.seed
    assert [c for _, c in passed.layout.asked] == [c for _, c in one.layout.asked][-1:] + [
        c for _, c in one.layout.asked
    ][:-1]


def test_scores_of_pictures_that_are_known() -> None:
    task, passed = make_subject_tasks(2, 2)

    def scored(colours: list[str]) -> dict[str, float]:
        things = [
            Thing(shape, colour, (x0 + x1) / 2, (y0 + y1) / 2, 0.12)
            for (shape, _, (x0, y0, x1, y1)), colour in zip(task.layout.things, colours, strict=True)
        ]
        return score_subjects(task, detect(render([Scene(tuple(things), task.layout.background)])[0]))

    right = scored([c for _, c in task.layout.asked])
    assert right == {"identity": 1.0, "blend": 0.0, "prompt": 1.0, "in_box": 1.0, "whole": 1.0}
    exchanged = scored([c for _, c in passed.layout.asked])
    assert exchanged == {"identity": 0.0, "blend": 1.0, "prompt": 1.0, "in_box": 0.0, "whole": 0.0}


def test_a_reference_is_moved_to_its_region() -> None:
    (task,) = make_subject_tasks(1, 1)
    box = task.layout.boxes[0]
    moved = task.subjects(True)[0].references[0].fitted(16, 16)
    (found,) = detect(moved.picture).objects
    assert found.box[0] >= box[0] - 0.01
    assert found.box[3] <= box[3] + 0.01
    assert found.centre == pytest.approx(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), abs=0.01)
    inside = np.asarray(moved.mask) > 127
    assert (inside & found.mask).sum() / (inside | found.mask).sum() > 0.9
    still = task.subjects(True, reposition=False)[0].references[0].fitted(16, 16)
    assert still.picture.size == (128, 128)


def test_the_rows_of_the_bench() -> None:
    ways = parse_ways(METHODS)
    assert ways[1].label == PLAIN
    assert [way.boxes for way in ways if "region-mask" in way.label] == [True] * 8
    assert [way.words for way in ways if "delayed-subject" in way.label] == ["learned", "found"]
    with pytest.raises(ac.ControlError, match="is unknown"):
        parse_ways("magic")
    with pytest.raises(ac.ControlError, match="after a colon stands one of boxes, found, not 'box'"):
        parse_ways("magic-face:box")


def test_how_far_pictures_are_apart() -> None:
    black, grey = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 51, np.uint8)
    assert difference(black, black) == 0
    assert difference(black, grey) == difference(grey, black) == pytest.approx(0.2)


def test_memory_is_what_lives_at_one_time() -> None:
    def run() -> None:
        first = torch.ones(1000)  # 4 kB
        second = first * 2
        del first
        shown = second.view(10, 100)
        assert (shown + 1).shape == (10, 100)  # beside the second, of which the view is

    assert peak_bytes(torch.device("cpu"), run) == 8000


def test_memory_grows_linearly_with_the_references() -> None:
    pipe = tiny.sd()

    def held(count: int) -> int:
        subjects = [ac.Subject("cat", [picture(n) for n in range(count)], region=LEFT)]
        draw = SubjectsPipeline(pipe)
        return peak_bytes(pipe.device, lambda: draw(PROMPT, subjects, method="magic-face", from_layer=0.0, **FEW))

    one, two_, four = held(1), held(2), held(4)
    assert two_ > one
    assert (four - two_) / 2 == pytest.approx(two_ - one, rel=0.25)


def test_a_measured_row(tmp_path: Path) -> None:
    pipe = tiny.sd()
    settings = Settings(steps=2)
    results = Results("subjects", "tiny", settings.as_dict(), {}, path=tmp_path / "rows.json")
    measure(pipe, parse_ways("none,magic-face{from_layer=0},region-mask+magic-face:boxes"), (1,), 1, settings, results)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [
        "none",
        "magic-face{from_layer=0}",
        "region-mask+magic-face:boxes",
    ]
    assert all(set(row["metrics"]) == set(TABLE) for row in rows)
    none, one = (row["metrics"]["memory"]["value"] for row in rows[:2])
    assert 0 < none < one
    assert rows[0]["metrics"]["diversity"]["value"] > 0
    (task,) = make_subject_tasks(1, 1)
    (spec,) = parse_methods("none")
    assert draw_subjects(pipe, task, Way("none", spec), settings).size == (32, 32)
