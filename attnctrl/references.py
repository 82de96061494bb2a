"""`Subject`: a phrase of the prompt, pictures of what it means, and where it belongs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from attnctrl.canvas import as_picture
from attnctrl.errors import ControlError
from attnctrl.regions import Region

SMALLEST = 8
"""Pixels on the shorter side of a reference; smaller ones show nothing."""


@dataclass(frozen=True, eq=False)
class Reference:
    """One picture of a subject. picture: RGB, upright; mask: of its size, mode L, white where the subject is."""

    picture: Image.Image
    mask: Image.Image

    def fitted(self, height: int, width: int) -> Reference:
        """Padded to the proportions of height x width (any unit), never cut: by its own edge, outside the mask."""
        tall, wide = self.picture.height, self.picture.width
        right = max(round(tall * width / height) - wide, 0)
        below = max(round(wide * height / width) - tall, 0)
        sides = ((below // 2, below - below // 2), (right // 2, right - right // 2))
        pixels = np.pad(np.asarray(self.picture), (*sides, (0, 0)), mode="edge")
        return Reference(Image.fromarray(pixels), Image.fromarray(np.pad(np.asarray(self.mask), sides)))

    def tokens(self, height: int, width: int) -> torch.Tensor:
        """Which cells of a grid of the fitted picture show the subject: bool (height * width), at least one."""
        return cells(Region("the subject", mask=self.fitted(height, width).mask), height, width)


def cells(region: Region, height: int, width: int) -> torch.Tensor:
    """The cells that a region covers by half, or, of a region too small for that, by most: bool (height * width)."""
    covered = region.raster(height, width, "coverage").flatten()
    return covered >= min(0.5, float(covered.max()))


@dataclass(frozen=True, eq=False)
class Subject:
    """Somebody or something with a look of its own, which the picture must keep.

    phrase: words of the prompt. image: a picture, or a list of several, of any size and mode; each a PIL image or an
    array (height, width[, channels]) of bytes or of floats in 0..1. mask: where it shows the subject, of any kind that
    `Region` takes, one per picture; by default what the picture's transparency leaves, or else all of it. region: where
    the subject belongs in the drawn picture: a box (x0, y0, x1, y1) in fractions, a mask or a `Region`; None: wherever
    the model puts it. strength: how much of it, >= 0; 0 is as if it were absent, and in one softmax with the
    picture's own keys 2 counts its keys twice. prompt: what the references show, for the model (default: the phrase).
    Raises ControlError for pictures, masks and regions that cannot be used.
    """

    phrase: str
    image: Any
    mask: Any = None
    region: Any = None
    strength: float = 1.0
    prompt: str | None = None
    references: tuple[Reference, ...] = field(default=(), init=False, repr=False)
    placed: Region | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.phrase, str) or not self.phrase.strip():
            raise ControlError("a subject needs a phrase: name the words of the prompt that mean it.")
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ControlError(f'subject "{self.phrase}": strength {self.strength} must be 0 or more.')
        pictures = list(self.image) if isinstance(self.image, list | tuple) else [self.image]
        masks = list(self.mask) if isinstance(self.mask, list | tuple) else [self.mask]
        if not pictures or any(p is None for p in pictures):
            raise ControlError(f'subject "{self.phrase}" has no picture: give image=..., one or a list.')
        if self.mask is None:
            masks = [None] * len(pictures)
        if len(masks) != len(pictures):
            raise ControlError(
                f'subject "{self.phrase}" has {len(masks)} masks for {len(pictures)} pictures: give one for each.'
            )
        made = tuple(self._reference(p, m) for p, m in zip(pictures, masks, strict=True))
        object.__setattr__(self, "references", made)
        object.__setattr__(self, "placed", self._placed())

    @property
    def text(self) -> str:
        """The prompt of its references."""
        return self.phrase if self.prompt is None else self.prompt

    def _reference(self, given: Any, mask: Any) -> Reference:
        picture = ImageOps.exif_transpose(as_picture(given))
        alpha = picture.convert("RGBA") if picture.has_transparency_data else None
        if min(picture.size) < SMALLEST:
            raise ControlError(
                f'subject "{self.phrase}": a picture of {picture.width}x{picture.height} pixels shows nothing: give '
                f"one of at least {SMALLEST}x{SMALLEST}."
            )
        if alpha is not None:
            # What is stored under transparent pixels is anything.
            picture = Image.alpha_composite(Image.new("RGBA", alpha.size, "white"), alpha)
            mask = alpha.getchannel("A") if mask is None else mask
        picture = picture.convert("RGB")
        if mask is None:
            return Reference(picture, Image.new("L", picture.size, 255))
        region = Region(self.phrase, mask=mask)
        region.check_aspect(picture.height, picture.width)
        inside = region.raster(picture.height, picture.width, "nearest")
        return Reference(picture, Image.fromarray((inside.numpy() * 255).astype(np.uint8)))

    def _placed(self) -> Region | None:
        if self.region is None or isinstance(self.region, Region):
            return self.region
        if isinstance(self.region, list | tuple) and len(self.region) == 4:
            return Region(self.phrase, box=self.region)  # type: ignore[arg-type]
        return Region(self.phrase, mask=self.region)
