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


def test_nothing_is_overwritten_unless_asked(model: str, tmp_path: Path, capsys: Any) -> None:
    """Neither the picture, nor the comparison beside it, nor the input; and none of it is drawn first."""
    edit = ["--target", "a dog", "--method", "none", "--inversion", "virtual"]
    for name in ("out.png", "out-compare.png"):
        (tmp_path / "new").mkdir(exist_ok=True)
        kept = tmp_path / "new" / name
        kept.write_bytes(b"mine")
        assert run("no-such-model", tmp_path, *edit) == 2
        assert f"{name} exists: choose another --out or pass --force" in capsys.readouterr().err
        assert kept.read_bytes() == b"mine"
        kept.unlink()
    given = tmp_path / "given.png"
    assert run("no-such-model", tmp_path, *edit, "--out", str(given)) == 2
    assert np.array_equal(np.asarray(Image.open(given)), np.asarray(picture()))
    (tmp_path / "new" / "out.png").write_bytes(b"mine")
    assert run(model, tmp_path, *edit, "--force") == 0
    assert Image.open(tmp_path / "new" / "out.png").size == (32, 32)


def test_a_photograph_that_was_turned_is_shown_upright(model: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(40, 24).save(tmp_path / "turned.png", exif=exif)
    given = ["--image", str(tmp_path / "turned.png"), "--target", "a dog", "--method", "none", "--inversion", "virtual"]
    assert run(model, tmp_path, *given) == 0
    assert Image.open(tmp_path / "new" / "out.png").size == (24, 40)
    compared = Image.open(tmp_path / "new" / "out-compare.png")
    upright = np.rot90(np.asarray(picture(40, 24)), -1)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(compared), (*upright.shape,))
    assert (windows[:, :, 0] == upright).all(axis=(2, 3, 4)).any()


def test_files_that_cannot_be_read_or_written_are_refused_first(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.png").write_text("no picture")
    clear = picture()
    clear.putalpha(128)
    clear.save(tmp_path / "clear.png")
    for more, sentence in (
        (["--image", str(tmp_path / "text.png")], "is not a picture that can be read"),
        (["--image", str(tmp_path / "none.png")], "No such file"),
        (["--mask", str(tmp_path / "text.png")], "is not a picture that can be read"),
        (["--out", str(tmp_path / "out.foo")], '".foo" is no kind of picture that can be written'),
        (["--out", str(tmp_path / "out")], '"" is no kind of picture'),
        (["--image", str(tmp_path / "clear.png"), "--out", str(tmp_path / "out.jpg")], "JPEG has no transparency"),
    ):
        assert run("no-such-model", tmp_path, "--edit", "cat=bird", *more) == 2
        assert sentence in capsys.readouterr().err


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
