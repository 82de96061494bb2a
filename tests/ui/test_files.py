"""Pictures of visitors: opened within limits; and pictures with the request that made them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from attnctrl.errors import ControlError
from attnctrl.ui.files import KEY, MEGABYTES, Outbox, open_picture, request_in

REQUEST = {"task": "layout", "prompt": 'a "cat" — 猫'}


def bomb(path: Path, side: int) -> Path:
    """A small PNG file that says it is a square of `side` pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 10_000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b""))
    return path


def test_a_picture_carries_its_request() -> None:
    outbox = Outbox()
    path = outbox.put(Image.new("RGB", (8, 8), "red"), "shapes-sd", REQUEST)
    assert request_in(path) == {**REQUEST, "model": "shapes-sd"}
    assert Image.open(path).getpixel((3, 3)) == (255, 0, 0)


def test_the_outbox_keeps_the_latest() -> None:
    outbox = Outbox(most=2)
    paths = [Path(outbox.put(Image.new("L", (8, 8)), "m", REQUEST)) for _ in range(3)]
    assert [path.exists() for path in paths] == [False, True, True]


def test_pictures_are_opened(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "c.webp"):
        Image.new("RGB", (10, 6), "blue").save(tmp_path / name)
        assert open_picture(tmp_path / name).size == (10, 6)


def test_bad_pictures_are_refused_with_a_sentence(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    gif = tmp_path / "a.gif"
    Image.new("L", (4, 4)).save(gif)
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 9).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:700])
    long = tmp_path / "long.png"
    long.write_bytes(b"\0" * (MEGABYTES * 2**20 + 1))
    for path, sentence in (
        (None, "there is no picture"),
        (tmp_path / "none.png", "there is no such picture"),
        (tmp_path, "there is no such picture"),
        (text, "is no picture that can be read"),
        (gif, "give one of PNG, JPEG, WEBP"),
        (cut, "cannot be decoded"),
        (long, "more than 16 MB"),
        (bomb(tmp_path / "large.png", 5000), "the picture is 5000x5000 pixels"),
        (bomb(tmp_path / "bomb.png", 60_000), "is no picture that can be read"),
    ):
        with pytest.raises(ControlError) as caught:
            open_picture(path)
        assert sentence in str(caught.value), path


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "the picture holds no parameters"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "cannot be read"),
        ('{"request": 3}', "cannot be read"),
    ],
)
def test_pictures_without_a_request_are_refused(tmp_path: Path, text: str | None, sentence: str) -> None:
    about = PngImagePlugin.PngInfo()
    if text is not None:
        about.add_text(KEY, text)
    Image.new("L", (4, 4)).save(tmp_path / "a.png", pnginfo=about)
    with pytest.raises(ControlError, match=sentence):
        request_in(tmp_path / "a.png")
