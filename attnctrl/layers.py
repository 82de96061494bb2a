"""`Layer`: an object of a given picture that is to go elsewhere, and where it then stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFilter

from attnctrl.errors import ControlError
from attnctrl.regions import Region


@dataclass(frozen=True, eq=False)
class Layer:
    """An object, by its mask of any kind that `Region` takes, and what becomes of it.

    dx, dy: how far it moves, in fractions of the picture's width and height, right and down. resize: by which factor
    its size changes; flip_horizontal, flip_vertical: left becomes right, top bottom; all three about the centroid of
    the mask. remove: it goes, and the rest does not matter. margin: by how much of the picture's longer side the mask
    is grown for the hole that the object leaves behind.
    Raises ControlError for numbers that are not finite, sizes that are not above 0 and margins that are not in [0, 1].
    """

    mask: Any
    dx: float = 0.0
    dy: float = 0.0
    resize: float = 1.0
    flip_horizontal: bool = False
    flip_vertical: bool = False
    remove: bool = False
    margin: float = 0.01

    def __post_init__(self) -> None:
        if not all(np.isfinite(v) for v in (self.dx, self.dy, self.resize)) or self.resize <= 0:
            raise ControlError(
                f"a layer cannot go by dx {self.dx}, dy {self.dy} with resize {self.resize}: give finite numbers, "
                "and a resize above 0."
            )
        if not 0 <= self.margin <= 1:
            raise ControlError(f"a layer has a margin of {self.margin}: give a fraction of the picture, 0 to 1.")

    @property
    def reshaped(self) -> bool:
        """Whether the object itself changes, beyond its place."""
        return not self.remove and (self.resize != 1 or self.flip_horizontal or self.flip_vertical)

    def at_start(self, size: tuple[int, int]) -> Image.Image:
        """The mask as given, white inside, for a picture of size (width, height)."""
        width, height = size
        region = Region("a layer", mask=self.mask)
        region.check_aspect(height, width)
        return Image.fromarray((region.raster(height, width, "nearest").numpy() * 255).astype(np.uint8))

    def hole(self, size: tuple[int, int]) -> Image.Image:
        """What the object leaves behind: its mask, grown by a square of `margin`."""
        reach = round(self.margin * max(size))
        mask = self.at_start(size)
        return mask.filter(ImageFilter.MaxFilter(2 * reach + 1)) if reach else mask

    def resized(self, picture: Image.Image) -> Image.Image:
        """The picture, resized and flipped about the object, not moved; the given one where that leaves nothing."""
        coefficients = self._affine(picture.size, moved=False)
        inside = _warped(Image.new("L", picture.size, 255), coefficients)
        return Image.composite(_warped(picture, coefficients, Image.Resampling.BICUBIC), picture, inside)

    def resized_mask(self, size: tuple[int, int]) -> Image.Image:
        """The mask, resized and flipped, not moved."""
        return _warped(self.at_start(size), self._affine(size, moved=False))

    def at_end(self, size: tuple[int, int]) -> Image.Image:
        """Where the object will stand: black for one that is removed."""
        if self.remove:
            return Image.new("L", size)
        return _warped(self.at_start(size), self._affine(size, moved=True))

    def _affine(self, size: tuple[int, int], moved: bool) -> tuple[float, ...]:
        """From a pixel of the result to that of the picture as given, as PIL takes it."""
        rows, columns = np.nonzero(np.asarray(self.at_start(size)))
        x, y = columns.mean() + 0.5, rows.mean() + 0.5
        a = (-1 if self.flip_horizontal else 1) / self.resize
        b = (-1 if self.flip_vertical else 1) / self.resize
        to_x, to_y = (x + self.dx * size[0], y + self.dy * size[1]) if moved else (x, y)
        return a, 0.0, x - a * to_x, 0.0, b, y - b * to_y


def footprint(layers: Sequence[Layer], size: tuple[int, int]) -> Image.Image:
    """Where a picture of size (width, height) changes: the holes of the layers and their new places."""
    return reduce(ImageChops.lighter, [place for one in layers for place in (one.hole(size), one.at_end(size))])


def shifted(cells: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """(..., height, width) moved by whole cells, with zeros where nothing comes from."""
    height, width = cells.shape[-2:]
    if abs(down) >= height or abs(right) >= width:
        return torch.zeros_like(cells)
    padded = F.pad(cells, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)))
    return padded[..., max(-down, 0) : max(-down, 0) + height, max(-right, 0) : max(-right, 0) + width]


def _warped(picture: Image.Image, coefficients: tuple[float, ...], how: Any = Image.Resampling.NEAREST) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, coefficients, resample=how)
