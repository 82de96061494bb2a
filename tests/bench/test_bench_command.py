"""The benches end to end on an untrained model of the shapes world's architecture, much narrowed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from attnctrl.bench import add_arguments, layout, main
from attnctrl.bench.results import fingerprint
from attnctrl.shapes import pretrained
from tests import dit


@pytest.fixture
def bench(model: str, tmp_path: Path) -> Any:
    """Runs a command line; gives the exit status and what the JSON file holds."""

    def run(line: str, *more: str) -> tuple[int, dict[str, Any]]:
        file = tmp_path / "results.json"
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        common = ["--model", model, "--steps", "2", "--json", str(file)]
        status = main(parser.parse_args([*line.split(), *common, *more]))
        return status, json.loads(file.read_text()) if file.exists() else {}

    return run


def test_layout_runs_every_method_and_keeps_the_rows(bench: Any, capsys: Any) -> None:
    status, found = bench("layout --images 2 --objects 2")
    methods = [row["method"] for row in found["rows"]]
    assert status == 0
    assert methods[0] == "none"
    assert "loco" in methods
    assert layout.GUIDED_THEN_MASKED in methods
    assert {"present", "in_box", "iou"} <= set(found["rows"][0]["metrics"])
    assert set(found["rows"][0]["metrics"]["iou"]) == {"value", "low", "high"}
    assert found["rows"][0]["ratio_to_none"] == 1
    assert all(row["images"] == 2 and row["seconds_per_image"] > 0 for row in found["rows"][:-1])
    ideal = found["rows"][-1]
    assert ideal["method"] == "ideal"
    assert ideal["metrics"]["in_box"]["value"] == 1
    assert ideal["metrics"]["fitted_iou"]["value"] > 0.95
    assert ideal["seconds_per_image"] is None
    assert {"torch", "diffusers", "attnctrl", "device", "threads", "dtype"} == set(found["environment"])
    assert f"| {layout.GUIDED_THEN_MASKED}" in capsys.readouterr().out


def test_resume_keeps_finished_rows_and_draws_the_rest(bench: Any) -> None:
    _, first = bench("layout --images 2 --objects 2 --methods none")
    status, second = bench("layout --images 2 --objects 2 --methods none,region-mask --resume")
    assert status == 0
    assert [row["method"] for row in second["rows"]] == ["none", "region-mask"]
    assert second["rows"][0] == first["rows"][0]
    assert bench("layout --images 2 --objects 2 --methods none --resume --guidance 7")[0] == 2
    assert bench("layout --images 3 --objects 2 --methods none --resume")[0] == 2


def test_a_method_that_cannot_work_is_a_row_with_its_reason(bench: Any, capsys: Any) -> None:
    # Two steps never reach this part of the run.
    status, found = bench("layout --images 2 --objects 2 --methods none,loco{window=0.8..0.9}")
    assert status == 1
    assert "acted nowhere" in found["rows"][1]["error"]
    assert "acted nowhere" in capsys.readouterr().out


def test_fidelity_gives_nouns_and_no_boxes(bench: Any) -> None:
    status, found = bench("fidelity --images 5 --objects 3")
    assert status == 0
    assert [row["method"] for row in found["rows"]] == [
        "none",
        "attend-excite",
        "a-star",
        "conform",
        "divide-bind",
        "init-no",
        "bundled-attention",
        "dynamic-prompt",
        "opti-prune",
        "semantic-protection",
    ]
    assert {"present", "bound", "extra", "neglected", "leaked"} <= set(found["rows"][1]["metrics"])
    assert {"bound_common", "bound_held_out"} <= set(found["rows"][1]["metrics"])  # the fifth has an untrained pair
    assert "loss" in found["rows"][1]["metrics"]
    assert "loss" not in found["rows"][0]["metrics"]
    assert "in_box" not in found["rows"][1]["metrics"]


def test_dose_is_one_row_per_value(bench: Any) -> None:
    status, found = bench("dose --images 2 --methods loco{iterations=1} --values 3,30")
    assert status == 0
    assert found["settings"]["split"] == "tune"
    assert [row["method"] for row in found["rows"]] == [
        "none",
        "loco{iterations=1;scale=3}",
        "loco{iterations=1;scale=30}",
    ]


def test_unknown_methods_and_models_are_refused_before_anything_runs(bench: Any, capsys: Any) -> None:
    assert bench("layout --methods lico")[0] == 2
    assert "choose one of" in capsys.readouterr().err
    assert bench("layout", "--model", "shapes-nothing")[0] == 2


def test_overhead_compares_with_the_stock_pipeline_at_each_batch_size(bench: Any, capsys: Any) -> None:
    status, found = bench("overhead --images 1")
    rows = {(row["method"], row["batch"]): row for row in found["rows"]}
    assert status == 0
    assert {batch for _, batch in rows} == {1, 4}
    assert found["environment"]["threads"] == 1
    assert rows["none", 4]["metrics"]["ratio"]["value"] == 1
    assert {"no controls", "region-mask", "recording 2 phrases"} <= {method for method, _ in rows}
    loss = rows["attend-excite{window=0..1}", 1]
    assert loss["losses"] == 2  # one in each of the two steps
    assert {"ratio", "ratio_cpu", "loss_to_forward", "loss_to_forward_backward"} == set(loss["metrics"])
    assert "| denoiser forward + backward" in capsys.readouterr().out


def test_arguments_of_the_call_belong_to_the_settings(bench: Any, capsys: Any) -> None:
    line = "layout --images 2 --objects 2 --methods none"
    _, plain = bench(line)
    assert "call" not in plain["settings"]
    status, called = bench(line, "--call", "guidance_scale=1.0", "guidance_rescale=0.5")
    assert status == 0
    assert called["settings"]["call"] == {"guidance_scale": 1.0, "guidance_rescale": 0.5}
    assert bench(line, "--resume")[0] == 2
    assert bench(line, "--call", "speed=1")[0] == 2
    assert 'a call of StableDiffusionPipeline has no "speed"' in capsys.readouterr().err


@pytest.mark.parametrize("name", ["shapes-dit", "shapes-dit+entities"])
def test_a_flux_class_model_runs_with_its_own_methods(
    name: str, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "_WEIGHTS", dit.write(tmp_path / "weights"))
    status, found = bench("layout --images 1 --objects 2 --steps 2", "--model", name)
    assert status == 0
    assert {"none", "region-mask", "eligen", "regional-flux", "ideal"} <= {row["method"] for row in found["rows"]}
    assert all(row["images"] == 1 for row in found["rows"])
    assert found["model"] == name
    status, found = bench("layout --images 2 --objects 2 --methods none,eligen{entity_tokens=8}", "--model", name)
    assert status == 0
    assert [row["images"] for row in found["rows"]] == [2, 2]
    status, found = bench("overhead --images 1", "--model", name)
    assert status == 0
    rows = {row["method"] for row in found["rows"] if row["batch"] == 4}
    assert {"none", "eligen", "region-mask", "attend-excite{window=0..1}", "denoiser forward + backward"} <= rows


def test_a_model_trained_anew_under_the_same_name_is_told_apart(model: str) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(model)
    before = fingerprint(pipe)
    assert before == fingerprint(StableDiffusionPipeline.from_pretrained(model))
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(1e-3)
    assert before != fingerprint(pipe)
