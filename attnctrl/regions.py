"""`Region`: a phrase and the part of the picture it belongs to; and its raster on any token grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

from attnctrl.errors import ControlError

Box = tuple[float, float, float, float]
RASTERS = ("coverage", "nearest", "any")
POLYGON_SIDE = 512


@dataclass(frozen=True, eq=False)
class Region:
    """Part of a picture and the phrase of the prompt that belongs there.

    phrase: words of the prompt. Exactly one of
      box: (x0, y0, x1, y1), fractions of the image, origin top left;
      mask: a PIL image, NumPy array or tensor, (height, width), anything above half of its range is inside; it must
        have the picture's aspect ratio;
      polygon: at least three (x, y) points, fractions of the image.
    prompt: text for methods that encode the region on its own (default: the phrase).
    weight: relative weight where regions are merged, >= 0.
    occurrence: which place of the prompt, if the phrase stands there several times (0 is the first; None: all).
    Raises ControlError when the shape is not usable.
    """

    phrase: str
    box: Box | None = None
    mask: Any = None
    polygon: Sequence[tuple[float, float]] | None = None
    prompt: str | None = None
    weight: float = 1.0
    occurrence: int | None = None
    _bitmap: torch.Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.phrase, str) or not self.phrase.strip():
            raise ControlError("a region needs a phrase: name the words of the prompt that belong there.")
        if sum(shape is not None for shape in (self.box, self.mask, self.polygon)) != 1:
            raise ControlError(f'region "{self.phrase}" needs exactly one of box, mask and polygon.')
        if not self.weight >= 0:
            raise ControlError(f'region "{self.phrase}": weight {self.weight} must be 0 or more.')
        if self.box is not None:
            object.__setattr__(self, "box", _checked_box(self.phrase, self.box))
        else:
            bitmap = _bitmap(self.phrase, self.mask) if self.mask is not None else self._draw_polygon()
            object.__setattr__(self, "_bitmap", bitmap)

    @property
    def text(self) -> str:
        """The prompt of this region alone."""
        return self.prompt if self.prompt is not None else self.phrase

    def _draw_polygon(self) -> torch.Tensor:
        assert self.polygon is not None
        points = [tuple(map(float, p)) for p in self.polygon]
        if len(points) < 3 or any(len(p) != 2 or not all(0 <= v <= 1 for v in p) for p in points):
            raise ControlError(
                f'region "{self.phrase}": a polygon needs at least three (x, y) points with values in 0..1.'
            )
        canvas = Image.new("1", (POLYGON_SIDE, POLYGON_SIDE))
        ImageDraw.Draw(canvas).polygon([(x * POLYGON_SIDE, y * POLYGON_SIDE) for x, y in points], fill=1)
        return _bitmap(self.phrase, np.asarray(canvas))

    def raster(self, height: int, width: int, how: str = "coverage") -> torch.Tensor:
        """The region on a grid of height x width cells: float32 (height, width) in [0, 1].

        how: "coverage" is the covered fraction of each cell, "nearest" is 1 where the cell's centre is inside,
        "any" is 1 where any part is inside. Raises ControlError when nothing is left on this grid.
        """
        if how not in RASTERS:
            raise ControlError(f'raster "{how}" is unknown: choose one of {", ".join(RASTERS)}.')
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            rows, columns = _overlap(y0, y1, height), _overlap(x0, x1, width)
            if how == "nearest":
                rows, columns = _centres(y0, y1, height), _centres(x0, x1, width)
            grid = rows[:, None] * columns[None, :]
        else:
            assert self._bitmap is not None
            bitmap = self._bitmap[None, None]
            if how == "nearest":
                grid = F.interpolate(bitmap, size=(height, width), mode="nearest-exact")[0, 0]
            else:
                grid = _area_resize(bitmap[0, 0], height, width)
        if how == "any":
            grid = (grid > 0).float()
        if not (grid > 0).any():
            raise ControlError(
                f'region "{self.phrase}" is empty after rasterising to {height}x{width} tokens: make it larger, or use '
                "a larger picture."
            )
        return grid

    def check_aspect(self, height: int, width: int) -> None:
        """Raise ControlError when a mask is not of the aspect ratio of a picture of height x width (any unit)."""
        if self.mask is None or self._bitmap is None:
            return
        mask_height, mask_width = self._bitmap.shape
        # One cell of slack on the coarser of the two, for sizes that are not whole multiples.
        slack = 1.0 / min(height, width) + 1.0 / min(mask_height, mask_width)
        if abs(np.log((mask_width / mask_height) / (width / height))) > slack:
            raise ControlError(
                f'region "{self.phrase}": the mask is {mask_width}x{mask_height} pixels, which is not the picture\'s '
                f"aspect ratio ({width}:{height}): give a mask of the picture's size."
            )


def _checked_box(phrase: str, box: Sequence[float]) -> Box:
    try:
        values = tuple(float(v) for v in box)
    except (TypeError, ValueError):
        values = ()
    if len(values) != 4 or not all(np.isfinite(values)):
        raise ControlError(f'region "{phrase}": a box is four finite numbers (x0, y0, x1, y1), found {box!r}.')
    x0, y0, x1, y1 = values
    if not all(0.0 <= v <= 1.0 for v in values):
        raise ControlError(
            f'region "{phrase}": box {values} reaches outside 0..1: coordinates are fractions of the picture.'
        )
    if x0 >= x1 or y0 >= y1:
        raise ControlError(
            f'region "{phrase}": box {values} is empty or reversed: give (x0, y0, x1, y1) with x0 < x1 and y0 < y1.'
        )
    return x0, y0, x1, y1


def _bitmap(phrase: str, mask: Any) -> torch.Tensor:
    """A mask of any usual kind as float32 (height, width) of zeros and ones."""
    if isinstance(mask, Image.Image):
        mask = ImageOps.exif_transpose(mask)
        if mask.mode.startswith("I;16"):
            mask = np.asarray(mask) / 257  # Pillow's own conversion is white from 255 on
        else:
            mask = np.asarray(mask.getchannel("A") if mask.mode in ("LA", "PA") else mask.convert("L"))
    array = np.asarray(mask.detach().cpu().float() if isinstance(mask, torch.Tensor) else mask)
    array = np.squeeze(array)
    if array.ndim != 2:
        raise ControlError(
            f'region "{phrase}": the mask has shape {tuple(np.shape(mask))}: give one channel, (height, width).'
        )
    if array.dtype != bool:
        array = array.astype(np.float64)
        if not np.isfinite(array).all():
            raise ControlError(f'region "{phrase}": the mask holds NaN or infinite values.')
        # Masks come as 0..1 or as 0..255; half of the range is the border of both.
        array = array > (127.5 if array.max(initial=0) > 1 else 0.5)
    if not array.any():
        raise ControlError(f'region "{phrase}": the mask is all zero: paint the part that belongs to the region.')
    return torch.from_numpy(array.astype(np.float32))


def _overlap(start: float, end: float, cells: int) -> torch.Tensor:
    """The covered fraction of each of `cells` cells by the interval [start, end] of [0, 1]."""
    edges = torch.arange(cells + 1, dtype=torch.float64) / cells
    covered = (torch.clamp(edges[1:], max=end) - torch.clamp(edges[:-1], min=start)).clamp(min=0)
    return (covered * cells).float()


def _centres(start: float, end: float, cells: int) -> torch.Tensor:
    centres = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    return ((centres >= start) & (centres < end)).float()


def _area_resize(bitmap: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Exact area average of a bitmap on any grid, finer or coarser."""

    def weights(source: int, target: int) -> torch.Tensor:
        edges = [_overlap(i / target, (i + 1) / target, source) for i in range(target)]
        stacked = torch.stack(edges)
        return stacked / stacked.sum(dim=1, keepdim=True)

    rows, columns = weights(bitmap.shape[0], height), weights(bitmap.shape[1], width)
    return (rows @ bitmap @ columns.T).clamp(0, 1)
