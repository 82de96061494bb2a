"""Tiles of a latent grid: their shapes, how many of them a window takes, and frames that every query sees."""

from __future__ import annotations

import torch

from attnctrl.errors import ControlError
from attnctrl.sites import Grid

SHAPES = {16: (1, 4, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (2, 8, 8)}
FLAT = {16: (1, 4, 4), 32: (1, 4, 8), 64: (1, 8, 8), 128: (1, 8, 16)}


def tile_shape(grid: Grid, block: int) -> Grid:
    """A tile of (frames, height, width) that fills a block, flat for pictures; never larger than the grid."""
    shape = FLAT[block] if grid[0] == 1 else SHAPES[block]
    return clipped(shape, grid)


def clipped(sizes: Grid, grid: Grid) -> Grid:
    """Sizes (frames, height, width) that are at most those of the grid."""
    frames, height, width = (min(one, most) for one, most in zip(sizes, grid, strict=True))
    return frames, height, width


def window_sizes(grid: Grid, density: float) -> Grid:
    """The window (frames, height, width) that holds about the share `density` of a grid, of the grid's shape.

    Axes of one token do not count; every axis keeps one at least.
    """
    share = density ** (1 / max(1, sum(size > 1 for size in grid)))
    frames, height, width = (max(1, round(size * share)) for size in grid)
    return frames, height, width


def multiple(sizes: Grid, tile: Grid, grid: Grid) -> Grid:
    """Sizes rounded to whole tiles, one at least, and no larger than the grid."""
    frames, height, width = (max(1, round(one / unit)) * unit for one, unit in zip(sizes, tile, strict=True))
    return clipped((frames, height, width), grid)


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
