"""bench readout and bench guidance: their measures by hand, and both end to end on an untrained model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnctrl.bench import add_arguments, main
from attnctrl.bench.guidance import colour_accuracy, judge
from attnctrl.bench.readout import _pairs, elsewhere, exact_masks, mask_iou
from attnctrl.bench.tasks import make_tasks
from attnctrl.shapes.detect import detect


def test_iou_of_masks() -> None:
    a, b = np.zeros((4, 4), dtype=bool), np.zeros((4, 4), dtype=bool)
    assert mask_iou(a, b) == 0
    a[0], b[0, :2], b[1, 0] = True, True, True
    assert mask_iou(a, b) == pytest.approx(2 / 5)
    assert mask_iou(b, b) == 1


def test_exact_masks_are_where_the_detector_finds_the_objects() -> None:
    (task,) = make_tasks(2, 1)
    found = {(f.shape, f.colour): f.mask for f in detect(task.ideal).objects}
    for asked, mask in zip(task.layout.asked, exact_masks(task), strict=True):
        assert mask_iou(found[asked], mask) > 0.9


def test_the_pair_of_a_point_shows_the_same_object() -> None:
    tasks = make_tasks(3, 6)
    for task, other, (x, y), (u, v) in _pairs(tasks):
        assert task.layout.asked[0] == other.layout.asked[0]
        shape, colour = task.layout.asked[0]
        assert all(s != shape and c != colour for s, c in other.layout.asked[1:])
        assert exact_masks(task)[0][int(y * 128), int(x * 128)]
        # Up to a pixel of rounding, the point is on the object there too.
        row, column = int(v * 128), int(u * 128)
        assert exact_masks(other)[0][max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].any()
        assert elsewhere(task, task).layout.things[0] == task.layout.things[0]


def test_what_is_well_formed() -> None:
    (task,) = make_tasks(3, 1)
    score = judge(task.ideal, task.layout.asked)
    assert score == {"well_formed": 1.0, "found": 3.0, "present": 1.0, "bound": 1.0, "colour": 1.0}
    assert judge(task.ideal, None) == {"well_formed": 1.0, "found": 3.0}
    empty = np.full((128, 128, 3), 0.96, dtype=np.float32)
    assert judge(empty, None) == {"well_formed": 0.0, "found": 0.0}
    assert judge(empty, task.layout.asked)["colour"] is None


def test_colour_accuracy_is_of_the_shapes_that_are_there() -> None:
    (task,) = make_tasks(2, 1)
    (a, red), (b, blue) = task.layout.asked
    detection = detect(task.ideal)
    assert colour_accuracy([(a, red), (b, blue)], detection) == 1
    assert colour_accuracy([(a, blue), (b, blue)], detection) == 0.5
    missing = next(s for s in ("circle", "star", "heart") if s not in (a, b))
    assert colour_accuracy([(a, red), (missing, blue)], detection) == 1
    assert colour_accuracy([(missing, blue)], detection) is None


@pytest.fixture
def bench(model: str, tmp_path: Path) -> Any:
    def run(line: str) -> tuple[int, dict[str, Any]]:
        file = tmp_path / "results.json"
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        common = ["--model", model, "--steps", "2", "--json", str(file), "--device", "cpu"]
        return main(parser.parse_args([*line.split(), *common])), json.loads(file.read_text()) if file.exists() else {}

    return run


def test_guidance_has_rows_with_and_without_a_prompt(bench: Any, capsys: Any) -> None:
    status, found = bench("guidance --images 2")
    assert status == 0
    rows = [(row["method"], row["objects"]) for row in found["rows"]]
    methods = ["none", "soft-pag", "self-attention-guidance", "semantic-cfg"]
    assert rows == [(m, 0) for m in methods[:3]] + [(m, 3) for m in methods]
    assert {"well_formed", "found"} == set(found["rows"][0]["metrics"])
    assert {"well_formed", "found", "present", "bound"} <= set(found["rows"][-1]["metrics"])
    assert "well_formed" in capsys.readouterr().out


def test_readout_has_a_row_for_each_way_of_measuring(bench: Any) -> None:
    status, found = bench(
        "readout --images 2 --methods none,segment{refinements=0},"
        "segment-like-me{iterations=1},correspond{iterations=1}"
    )
    assert status == 0
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == [
        "none: point",
        "segment{refinements=0}: drawn",
        "segment{refinements=0}: given",
        "segment-like-me{iterations=1}: example",
        "correspond{iterations=1}: point",
    ]
    assert {"error", "within"} == set(rows["none: point"]["metrics"])
    assert set(rows["segment{refinements=0}: given"]["metrics"]) == {"iou"}
    assert bench("readout --images 2 --methods loco")[0] == 2
