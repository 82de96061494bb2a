"""What a run of the page gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from attnctrl.maps import Maps

Pictures = Sequence[Image.Image]
Clip = list[Image.Image]
Drawn = Image.Image | Clip
"""A picture, or the frames of a clip."""


@dataclass(frozen=True)
class Result:
    """stock, controlled: the pictures or clips. Of an edit what the run makes of the given one unchanged, and the
    edited one; of reading the picture that shows what is looked for, and the one where it was found.

    overlays: heat maps over the picture, masks, or references as the run drew them, with their phrases; of a clip its
    frames in a row, and heat maps over them. report: what acted where, and what it cost.
    """

    stock: Drawn | None
    controlled: Drawn | None
    overlays: list[tuple[Image.Image, str]] = field(default_factory=list)
    report: str = ""
    maps: Maps | None = None
