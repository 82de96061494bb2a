"""`bench sparse` on an untrained video model, and its measures by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attnctrl as ac
from attnctrl.bench import add_arguments, main
from attnctrl.bench.likeness import psnr, ssim
from attnctrl.bench.sparse import Drawn, Recall, latent_grid, parse_densities, scores
from attnctrl.bench.sparse_ways import make, radial_settings
from attnctrl.controls.sparse.radial import radial_blocks
from attnctrl.shapes.measure_clips import probe_clip, rendered
from tests.video_model import draw, pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("video")
    pipeline(layers=2).save_pretrained(folder)  # the first of them stays dense
    return str(folder)


def test_rows_of_every_method(model: str, tmp_path: Path, capsys: Any) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    file = tmp_path / "sparse.json"
    given = ["sparse", "--model", model, "--images", "1", "--steps", "4", "--json", str(file)]
    names = ["oracle-blocks", "radial", "paro", "vmoba", "rettention", "random-blocks"]
    assert main(parser.parse_args([*given, "--methods", ",".join(names), "--densities", "1,0.3"])) == 0
    rows = {row["method"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["none", *(f"{name}@{density}" for density in ("1", "0.3") for name in names)]
    for name in names:
        full, thin = rows[f"{name}@1"]["metrics"], rows[f"{name}@0.3"]["metrics"]
        assert full["psnr"]["value"] > 50 or name == "vmoba"
        assert 0.05 < thin["visited"]["value"] < full["visited"]["value"] <= 1.0
        assert thin["psnr"]["value"] < 60
        kept = [rows[label]["metrics"]["kept"]["value"] for label in (f"{name}@0.3", "none")]
        assert thin["kept_change"]["value"] == pytest.approx(kept[0] - kept[1])
    recall = {name: rows[f"{name}@0.3"]["metrics"]["recall"]["value"] for name in names if name != "rettention"}
    assert recall["oracle-blocks"] == max(recall[name] for name in ("oracle-blocks", "paro", "random-blocks"))
    assert rows["radial@0.3"]["recall_by_layer"].keys() == {"blocks.1.attn1"}
    assert "oracle-blocks@0.3" in capsys.readouterr().out


def test_everything_visited_is_all_of_the_mass() -> None:
    inner = ac.OracleBlocks(density=1.0, block=16, fall_back=False)
    control = Recall(inner=inner, where=inner.where)
    pipe = pipeline()
    with ac.control(pipe, control, record=False):
        draw(pipe)
    (masses,) = control.found.values()
    assert masses == pytest.approx([1.0], abs=1e-5)


def test_a_rendered_clip_scores_full_marks_beside_itself() -> None:
    clip = probe_clip(0)
    frames = Drawn(rendered(0, clip).permute(0, 2, 3, 1).double().numpy(), 1.0)
    found = scores(clip, frames, frames)
    assert found["kept"] == found["colour_kept"] == found["moving"] == 1.0
    assert found["psnr"] == 60.0
    assert found["ssim"] == pytest.approx(1.0)


def test_likeness_by_hand() -> None:
    black = np.zeros((16, 16, 3))
    assert psnr(black, black + 0.1) == pytest.approx(20.0)
    # Even pictures differ in their means alone: (2 a b + c) / (a^2 + b^2 + c).
    grey, light = black + 0.5, black + 0.6
    assert ssim(grey, light) == pytest.approx((2 * 0.3 + 1e-4) / (0.61 + 1e-4))
    noise = np.random.default_rng(0).random((2, 16, 16, 3))
    assert ssim(noise, noise) == pytest.approx(1.0)
    assert ssim(noise, 1 - noise) < 0


def test_radial_keeps_as_many_of_the_papers_floors_as_a_density_allows() -> None:
    found = {density: radial_settings(density, 9, 64, 16) for density in (1.0, 0.5, 0.3, 0.2, 0.1)}
    for density, settings in found.items():
        visited = radial_blocks(9, 64, block=16, **settings)
        assert 0.7 * density < float(visited.float().mean()) <= density
        assert visited.any(dim=1).all()
    # On so few and small frames the floors of the paper alone are three quarters: neighbours whole, bands of a block.
    floors = {"sink": 1, "whole": 1, "floor": 1.0}
    assert float(radial_blocks(9, 64, 0.0, 16, **floors).float().mean()) == pytest.approx(0.773, abs=1e-3)
    assert floors.items() <= found[1.0].items()
    assert [found[d]["sink"] for d in (0.5, 0.3, 0.2, 0.1)] == [1, 1, 0, 0]
    # In blocks of a 16th of a frame the sink, the frame itself and bands of half the paper's decay are left at 0.3.
    small = radial_settings(0.3, 9, 64, 4)
    assert {"sink": 1, "whole": 0, "floor": 0.0}.items() <= small.items()
    assert small["decay"] == pytest.approx(0.094, abs=0.01)
    assert 0.27 < float(radial_blocks(9, 64, block=4, **small).float().mean()) <= 0.3


def test_densities() -> None:
    assert parse_densities("1,0.3") == (1.0, 0.3)
    for text in ("0", "1.5", "x", ""):
        with pytest.raises(ac.ControlError, match="above 0 and at most 1"):
            parse_densities(text)

    pipe = pipeline()
    assert latent_grid(pipe) == (9, 8, 8)
    with pytest.raises(ac.ControlError, match="choose one of oracle-blocks"):
        make("loco", 0.3, (9, 8, 8), pipe, lambda: None)
