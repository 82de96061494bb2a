"""`Subject`: a phrase of the prompt, pictures of what it means, and where it belongs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from attnctrl.canvas import as_picture
from attnctrl.errors import ControlError
from attnctrl.regions import Region

SMALLEST = 8
"""Pixels on the shorter side of a reference; smaller ones show nothing."""
SIDE = 512
"""About so many pixels on the longer side of a reference that is moved to its place."""


@dataclass(frozen=True, eq=False)
class Reference:
    """One picture of a subject. picture: RGB, upright; mask: of its size, mode L, white where the subject is.

    place: the region that the subject is to fill in a run's rows; None: where it is.
    """

    picture: Image.Image
    mask: Image.Image
    place: Region | None = None

    def fitted(self, height: int, width: int) -> Reference:
        """In the proportions of height x width (any unit), what is missing made of its own edge, outside the mask.

        Never cut, or with a `place` scaled and moved until the subject fills it as far as its proportions allow.
        """
        if self.place is not None:
            return self._placed(self.place, height, width)
        tall, wide = self.picture.height, self.picture.width
        right = max(round(tall * width / height) - wide, 0)
        below = max(round(wide * height / width) - tall, 0)
        sides = ((below // 2, below - below // 2), (right // 2, right - right // 2))
        pixels = np.pad(np.asarray(self.picture), (*sides, (0, 0)), mode="edge")
        return Reference(Image.fromarray(pixels), Image.fromarray(np.pad(np.asarray(self.mask), sides)))

    def _placed(self, place: Region, height: int, width: int) -> Reference:
        size = max(SIDE // max(height, width), 1)
        rows, columns = height * size, width * size
        place.check_aspect(height, width)
        y0, y1, x0, x1 = _bounds(place.raster(rows, columns, "any") > 0)
        top, bottom, left, right = _bounds(torch.from_numpy(np.asarray(self.mask) > 127))
        scale = min((y1 - y0) / (bottom - top), (x1 - x0) / (right - left))
        down = (torch.arange(rows) + 0.5 - (y0 + y1) / 2) / scale + (top + bottom) / 2
        across = (torch.arange(columns) + 0.5 - (x0 + x1) / 2) / scale + (left + right) / 2
        tall, wide = self.picture.height, self.picture.width
        grid = torch.stack(torch.meshgrid(2 * across / wide - 1, 2 * down / tall - 1, indexing="xy"), dim=-1)[None]
        pixels = torch.from_numpy(np.array(self.picture)).permute(2, 0, 1)[None].float()
        shown = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)[0].round()
        inside = torch.from_numpy(np.array(self.mask))[None, None].float()
        mask = F.grid_sample(inside, grid, mode="nearest", align_corners=False)[0, 0]
        return Reference(
            Image.fromarray(shown.permute(1, 2, 0).numpy().astype(np.uint8)),
            Image.fromarray(mask.numpy().astype(np.uint8)),
        )

    def tokens(self, height: int, width: int) -> torch.Tensor:
        """Which cells of a grid of the fitted picture show the subject: bool (height * width), at least one."""
        return cells(Region("the subject", mask=self.fitted(height, width).mask), height, width)


def _bounds(mask: torch.Tensor) -> tuple[int, int, int, int]:
    """The first and the end row, the first and the end column of what is True."""
    rows, columns = (mask.any(dim=axis).nonzero().flatten() for axis in (1, 0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


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
    the model puts it. reposition: with a region, references are scaled and moved until the subject fills it, so that
    what a model ties to places fits; False leaves it where it is in them. strength: how much of it, >= 0; 0 is as if
    it were absent, and in one softmax with the picture's own keys 2 counts its keys twice. prompt: what the
    references show, for the model (default: the phrase).
    Raises ControlError for pictures, masks and regions that cannot be used.
    """

    phrase: str
    image: Any
    mask: Any = None
    region: Any = None
    strength: float = 1.0
    prompt: str | None = None
    reposition: bool = True
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
        object.__setattr__(self, "placed", self._placed())
        made = tuple(self._reference(p, m) for p, m in zip(pictures, masks, strict=True))
        object.__setattr__(self, "references", made)

    @property
    def text(self) -> str:
        """The prompt of its references."""
        return self.phrase if self.prompt is None else self.prompt

    def _reference(self, given: Any, mask: Any) -> Reference:
        picture = as_picture(given)
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
        place = self.placed if self.reposition else None
        if mask is None:
            return Reference(picture, Image.new("L", picture.size, 255), place)
        region = Region(self.phrase, mask=mask)
        region.check_aspect(picture.height, picture.width)
        inside = region.raster(picture.height, picture.width, "nearest")
        return Reference(picture, Image.fromarray((inside.numpy() * 255).astype(np.uint8)), place)

    def _placed(self) -> Region | None:
        if self.region is None or isinstance(self.region, Region):
            return self.region
        if isinstance(self.region, list | tuple) and len(self.region) == 4:
            return Region(self.phrase, box=self.region)  # type: ignore[arg-type]
        return Region(self.phrase, mask=self.region)
