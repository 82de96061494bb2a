"""attnctrl layout, from its arguments to its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import attnctrl as ac
from attnctrl.cli import main
from attnctrl.commands.layout import parse_regions
from attnctrl.commands.settings import parse_settings
from attnctrl.shapes import pretrained
from tests import dit, tiny

BOXES = ["--region", "a cat@0.0,0.0,0.5,1.0", "--region", "a dog@0.5,0.0,1.0,1.0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny.sd().save_pretrained(path)
    return str(path)


def run(model: str, out: Path, *more: str, regions: list[str] | None = None) -> int:
    size = ["--steps", "2", "--height", "32", "--width", "32", "--device", "cpu"]
    asked = BOXES if regions is None else regions
    return main(["layout", "--prompt", tiny.PROMPT, *asked, "--model", model, *size, "--out", str(out), *more])


def test_it_leaves_the_picture_and_the_comparison(model: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "new" / "picture.png"
    assert run(model, out, "--method", "region-mask", "--set", "boost=2") == 0
    assert Image.open(out).size[0] > 0
    beside = Image.open(out.with_name("picture-compare.png"))
    assert beside.width > 2 * Image.open(out).width - 1
    printed = capsys.readouterr().out
    assert "RegionMask" in printed
    assert str(out) in printed


def test_a_seed_gives_the_same_picture(model: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run(model, tmp_path / f"{name}.png", "--method", "region-mask+loco", "--seed", "3") == 0
    one, two = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("one", "two"))
    assert np.array_equal(one, two)


def test_nothing_is_overwritten_unasked(model: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "picture.png"
    out.write_bytes(b"precious")
    assert run(model, out) == 2
    assert "exists: choose another --out or pass --force" in capsys.readouterr().err
    assert out.read_bytes() == b"precious"
    assert run(model, out, "--method", "region-mask", "--force") == 0
    assert Image.open(out).size[0] > 0


@pytest.mark.parametrize(
    ("regions", "more", "sentence"),
    [
        (["--region", "a cat@0,0,1"], [], "write phrase@x0,y0,x1,y1 with four numbers"),
        (["--region", "a cat"], [], '"a cat" has no place'),
        (["--region", "a cat@0,0,2,1"], [], "a cat"),
        (["--region", "a bird@0,0,1,1"], ["--method", "region-mask"], '"a bird" is not in the prompt'),
        (BOXES, ["--method", "nothing"], 'method "nothing" is unknown'),
        (BOXES, ["--set", "scale"], '--set "scale": write name=value'),
        (BOXES, ["--call", "eta"], '--call "eta": write name=value'),
        (BOXES, ["--call", "scale=3"], 'a call of StableDiffusionPipeline has no "scale": it has prompt, height'),
        (BOXES, ["--set", "strength=1"], '"strength" is no parameter of loco'),
        (["--region", "a cat"], ["--mask", "nowhere.png"], "nowhere.png"),
    ],
)
def test_bad_input_ends_with_its_sentence(
    model: str, tmp_path: Path, capsys: Any, regions: list[str], more: list[str], sentence: str
) -> None:
    assert run(model, tmp_path / "picture.png", *more, regions=regions) == 2
    printed = capsys.readouterr().err
    assert "attnctrl layout: " in printed
    assert sentence in printed
    # Only what the prompt and the model decide waits until the model is loaded.
    assert ("Loading pipeline" in printed) == ("not in the prompt" in sentence or "a call of" in sentence)
    assert not (tmp_path / "picture.png").exists()


def test_phrases_alone_take_the_masks_in_order(tmp_path: Path) -> None:
    left = np.zeros((16, 16), dtype=np.uint8)
    left[:, :8] = 255
    Image.fromarray(left).save(tmp_path / "left.png")
    Image.fromarray(255 - left).save(tmp_path / "right.png")
    masks = [str(tmp_path / "left.png"), str(tmp_path / "right.png")]
    cat, box, dog = parse_regions(["cat", "bird@0,0,1,0.5", "dog"], masks)
    assert cat.raster(1, 2).tolist() == [[1.0, 0.0]]
    assert dog.raster(1, 2).tolist() == [[0.0, 1.0]]
    assert box.box == (0.0, 0.0, 1.0, 0.5)
    with pytest.raises(ac.ControlError, match="belongs to no region"):
        parse_regions(["cat@0,0,1,1"], masks)


def test_settings_are_python_values() -> None:
    found = parse_settings(["scale=1.5", "sharpen=False", "free_tokens=push", "sizes=[1, 2]"], "--set")
    assert found == {"scale": 1.5, "sharpen": False, "free_tokens": "push", "sizes": [1, 2]}


def test_call_arguments_reach_the_pipeline(model: str, tmp_path: Path) -> None:
    pictures = []
    for name, more in (("a", ()), ("b", ("--guidance", "1")), ("c", ("--call", "guidance_scale=1.0", "height=64"))):
        out = tmp_path / f"{name}.png"
        assert run(model, out, "--method", "region-mask", *more) == 0
        pictures.append(np.asarray(Image.open(out)))
    assert not np.array_equal(pictures[0], pictures[1])
    assert pictures[2].shape == (64, 32, 3)


@pytest.mark.parametrize("name", ["shapes-dit", "shapes-dit+entities"])
def test_a_flux_class_model_needs_no_further_arguments(
    name: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "_WEIGHTS", dit.write(tmp_path / "weights"))
    prompt = ["--prompt", "a red circle and a blue star"]
    regions = ["--region", "a red circle@0,0,0.5,1", "--region", "a blue star@0.5,0,1,1"]
    method = ["--method", "eligen", "--set", "entity_tokens=8", "--steps", "2", "--device", "cpu"]
    out = tmp_path / "picture.png"
    assert main(["layout", *prompt, *regions, *method, "--model", name, "--out", str(out)]) == 0
    assert Image.open(out).size == (128, 128)
    assert "EliGen" in capsys.readouterr().out
