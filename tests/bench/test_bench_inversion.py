"""`bench inversion`: its measures by hand, and its rows."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import attnctrl as ac
from attnctrl import shapes
from attnctrl.bench import add_arguments, inversion, main
from attnctrl.bench.draw import Settings
from attnctrl.bench.results import Results
from attnctrl.bench.tasks import make_tasks
from attnctrl.inversion import Job
from tests import tiny
from tests.transformers import FAMILIES

EXACT = ("direct", "edit-friendly", "virtual")


def test_measures_by_hand() -> None:
    given, trip, redrawn = (np.full((4, 4, 3), v) for v in (0.5, 0.6, 0.501))
    found = inversion.score(given, trip, redrawn)
    assert found["psnr"] == pytest.approx(60.0)
    assert found["round_trip"] == pytest.approx(20.0)
    assert found["to_round_trip"] == pytest.approx(-20 * np.log10(0.099))


def test_the_round_trip_is_what_a_run_returns_that_ends_with_the_pictures_latents() -> None:
    pipe = shapes.load("sd")
    pipe.set_progress_bar_config(disable=True)
    picture = Image.fromarray((make_tasks(2, 1)[0].ideal * 255).round().astype(np.uint8))
    clean = Job(pipe, picture, ["", ""]).clean()

    def put(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": clean}

    (drawn,) = pipe("", num_inference_steps=1, guidance_scale=1.0, callback_on_step_end=put).images
    assert np.array_equal(inversion.unit(drawn), inversion.round_trip(pipe, picture))


def test_each_kind_of_model_has_its_own_rows() -> None:
    assert inversion.default_methods(tiny.sd()) == inversion.METHODS
    assert inversion.default_methods(FAMILIES["flux"].make()) == "rf,virtual"
    assert inversion.parse_inversions("ddim, virtual") == ["ddim", "virtual"]
    with pytest.raises(ac.ControlError, match="choose one of ddim"):
        inversion.parse_inversions("magic")


def test_rows_of_the_command(model: str, tmp_path: Path) -> None:
    """On an untrained model: edits of equal prompts come back exactly by two of the inversions."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    file = tmp_path / "inversion.json"
    given = ["inversion", "--model", model, "--images", "1", "--steps", "3", "--json", str(file)]
    assert main(parser.parse_args([*given, "--methods", "ddim,edit-friendly,virtual"])) == 0
    written = json.loads(file.read_text())
    assert written["settings"]["guidance"] == 1.0
    rows = {row["method"]: row["metrics"] for row in written["rows"]}
    assert list(rows) == ["ddim", "edit-friendly", "virtual"]
    assert all(rows[name]["to_round_trip"]["value"] > 50 for name in ("edit-friendly", "virtual"))
    assert main(parser.parse_args([*given, "--methods", "rf"])) == 1


@pytest.mark.slow
def test_the_picture_comes_back_within_the_autoencoders_own_error() -> None:
    """On the trained model, source and target prompt alike, guidance 1, 50 steps."""
    pipe = shapes.load("sd")
    pipe.set_progress_bar_config(disable=True)
    results = Results("inversion", "shapes-sd", {}, {})
    settings = Settings(steps=50, guidance=1.0)
    inversion.measure(pipe, ["ddim", *EXACT], (2,), 1, settings, results)
    for row in results.rows:
        found = {name: estimate.value for name, estimate in row.metrics.items()}
        assert found["to_round_trip"] > (55 if row.method in EXACT[1:] else found["round_trip"])
