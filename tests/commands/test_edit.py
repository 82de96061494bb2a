"""attnctrl edit, from its arguments to its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import attnctrl as ac
from attnctrl.cli import main
from attnctrl.commands.edit import parse_edits
from tests import tiny
from tests.editing.material import SOURCE, picture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny.sd().save_pretrained(path)
    return str(path)


def run(model: str, folder: Path, *more: str) -> int:
    picture().save(folder / "given.png")
    given = ["--image", str(folder / "given.png"), "--source", SOURCE, "--model", model, "--device", "cpu"]
    return main(["edit", *given, "--steps", "2", "--out", str(folder / "new" / "out.png"), *more])


def test_it_leaves_the_picture_and_the_comparison(model: str, tmp_path: Path, capsys: Any) -> None:
    Image.fromarray(np.tile(np.array([0, 255], np.uint8).repeat(16), (32, 1))).save(tmp_path / "mask.png")
    assert run(model, tmp_path, "--edit", "cat=bird", "--mask", str(tmp_path / "mask.png"), "--feather", "0") == 0
    out = np.asarray(Image.open(tmp_path / "new" / "out.png"))
    assert np.array_equal(out[:, :16], np.asarray(picture())[:, :16])
    assert Image.open(tmp_path / "new" / "out-compare.png").width > 3 * 32
    assert "PromptToPrompt" in capsys.readouterr().out
    assert run(model, tmp_path, "--edit", "cat=bird") == 2
    assert "exists" in capsys.readouterr().err
    assert run(model, tmp_path, "--target", "a dog", "--method", "none", "--inversion", "virtual", "--force") == 0


def test_edits_and_masks(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture().save(tmp_path / name)
    files = [str(tmp_path / name) for name in ("a.png", "b.png")]
    edits, whole = parse_edits(["red cat = blue dog", "x="], files)
    assert [(e.source, e.target, e.mask is None) for e in edits] == [("red cat", "blue dog", False), ("x", "", False)]
    assert whole is None
    edits, whole = parse_edits(["a=b", "c=d"], files[:1])
    assert whole is not None
    assert edits[0].mask is None
    with pytest.raises(ac.ControlError, match="2 --mask for 3 --edit"):
        parse_edits(["a=b", "c=d", "e=f"], files)
    with pytest.raises(ac.ControlError, match="write words=other words"):
        parse_edits(["cat"], [])
