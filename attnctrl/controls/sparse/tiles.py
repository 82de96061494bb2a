"""Tiles of a latent grid: their shapes, how many of them a window takes, and frames that every query sees."""

from __future__ import annotations

from itertools import product
from math import ceil, floor, log, prod

import torch

from attnctrl.errors import ControlError
from attnctrl.sites import Grid

SHAPES = {4: (1, 2, 2), 8: (2, 2, 2), 16: (1, 4, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (2, 8, 8)}
FLAT = {4: (1, 2, 2), 8: (1, 2, 4), 16: (1, 4, 4), 32: (1, 4, 8), 64: (1, 8, 8), 128: (1, 8, 16)}


def tile_shape(grid: Grid, block: int) -> Grid:
    """A tile of (frames, height, width) that fills a block, flat for pictures; never larger than the grid."""
    shape = FLAT[block] if grid[0] == 1 else SHAPES[block]
    return clipped(shape, grid)


def clipped(sizes: Grid, grid: Grid) -> Grid:
    """Sizes (frames, height, width) that are at most those of the grid."""
    frames, height, width = (min(one, most) for one, most in zip(sizes, grid, strict=True))
    return frames, height, width


def tile_counts(grid: Grid, tile: Grid) -> Grid:
    """How many tiles lie along each axis."""
    frames, height, width = (-(-size // unit) for size, unit in zip(grid, tile, strict=True))
    return frames, height, width


def window_sizes(tiles: Grid, density: float, odd: bool = False) -> Grid:
    """Tiles along (frames, height, width) of the window that holds nearest to the share `density` of `tiles`.

    Of windows of the grid's own shape, each side rounded up or down, one at least. odd: to odd numbers, or all.
    """
    share = density ** (1 / max(1, sum(count > 1 for count in tiles)))
    sides = []
    for count in tiles:
        low, high = floor(count * share), ceil(count * share)
        if odd:
            low = max(1, low - 1 + low % 2)
            high = low + 2 if count * share > low else low
        sides.append({max(1, low), max(1, min(high, count))})
    frames, height, width = min(product(*sides), key=lambda window: abs(log(prod(window) / (prod(tiles) * density))))
    return frames, height, width


def checked(name: str, field: str, sizes: tuple[int, ...] | None) -> None:
    """Raise ControlError unless sizes is None or three numbers of at least 1."""
    if sizes is not None and (len(sizes) != 3 or min(sizes) < 1):
        raise ControlError(f"{name}: {field} is {sizes}: give (frames, height, width), each 1 or more.")


def sees_frames(order: torch.Tensor, block: torch.Tensor, blocks: int, frame_tokens: int, frames: int) -> torch.Tensor:
    """The blocks that hold tokens of the first `frames` frames: bool (blocks,).

    order: the latents' order, int64 (latents,); block: each place's block, int64 (latents,).
    """
    held = torch.zeros(blocks, dtype=torch.bool, device=order.device)
    held[block[order < frames * frame_tokens]] = True
    return held
