"""Pictures from and for visitors: opened within limits, and written with the request that made them."""

from __future__ import annotations

import json
import tempfile
import threading
from collections import deque
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from attnctrl.errors import ControlError
from attnctrl.ui.result import Drawn

MEGABYTES, PIXELS, PICTURES = 16, 4096 * 4096, 8
"""The largest file and picture that are opened, and how many at once."""

FORMATS = ("PNG", "JPEG", "WEBP")
KEY = "attnctrl"
TOLD = 0x010E
"""The tag of EXIF data, ImageDescription, that holds in a clip what the text `KEY` holds in a PNG."""

FRAME = 125
"""Milliseconds for which a frame of a clip is shown."""


def open_picture(path: Any) -> Image.Image:
    """A visitor's picture, decoded. Raises ControlError for other files, for large ones and for broken ones."""
    picture = _open(path, FORMATS)
    try:
        picture.load()
    except Exception as error:  # decoders raise whatever they like
        raise ControlError(f"the picture cannot be decoded: {error}") from None
    return picture


def open_pictures(paths: Any) -> list[Image.Image]:
    """Several, in order. Raises ControlError as `open_picture` does, and for more than `PICTURES`."""
    given = [paths] if isinstance(paths, str | Path) else [*(paths or [])]
    if len(given) > PICTURES:
        raise ControlError(f"there are {len(given)} pictures: give at most {PICTURES}.")
    return [open_picture(path) for path in given]


def _open(path: Any, formats: tuple[str, ...]) -> Image.Image:
    if not path:
        raise ControlError("there is no picture: upload one.")
    file = Path(str(path))
    if not file.is_file():
        raise ControlError("there is no such picture: upload one.")
    if file.stat().st_size > MEGABYTES * 2**20:
        raise ControlError(f"the file has more than {MEGABYTES} MB.")
    try:
        # Nothing is decoded yet; PIL itself refuses sizes beyond its own limit here.
        picture = Image.open(file, formats=formats)
    except Exception:
        raise ControlError(f"the file is no picture that can be read: give one of {', '.join(FORMATS)}.") from None
    if picture.width * picture.height > PIXELS:
        raise ControlError(
            f"the picture is {picture.width}x{picture.height} pixels: give one of at most {PIXELS // 10**6} million."
        )
    return picture


def request_in(path: Any) -> dict[str, Any]:
    """The request that made a picture or a clip, with the model's name as "model".

    Raises ControlError where there is none.
    """
    picture = _open(path, ("PNG", "WEBP"))
    try:
        text = picture.info.get(KEY) if picture.format == "PNG" else picture.getexif().get(TOLD)
    except Exception:  # parsers of EXIF data raise whatever they like
        text = None
    if not isinstance(text, str):
        raise ControlError("the picture holds no parameters: give a file that this page made.")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("request"), dict):
        raise ControlError("the parameters in the picture cannot be read.")
    return {**found["request"], "model": str(found.get("model", ""))}


class Outbox:
    """A folder of pictures for download, its own until the process ends; the oldest go when there are many."""

    def __init__(self, most: int = 64) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="attnctrl-ui-")
        self._names: deque[Path] = deque()
        self._most, self._count, self._lock = most, 0, threading.Lock()

    def put(self, picture: Drawn, model: str, request: dict[str, Any]) -> str:
        """Write a picture as PNG, a clip as animated WebP, with its request; returns the path."""
        text = json.dumps({"attnctrl": version("attnctrl"), "model": model, "request": request})
        kind = "webp" if isinstance(picture, list) else "png"
        with self._lock:
            self._count += 1
            path = Path(self.folder.name) / f"attnctrl-{request['task']}-{self._count}.{kind}"
            self._names.append(path)
            old = self._names.popleft() if len(self._names) > self._most else None
        if isinstance(picture, list):
            exif = Image.Exif()
            exif[TOLD] = text
            more: dict[str, Any] = {"save_all": True, "append_images": picture[1:], "duration": FRAME, "loop": 0}
            picture[0].save(path, quality=90, exif=exif, **more)
        else:
            about = PngImagePlugin.PngInfo()
            about.add_text(KEY, text)
            picture.save(path, pnginfo=about)
        if old is not None:
            old.unlink(missing_ok=True)
        return str(path)
