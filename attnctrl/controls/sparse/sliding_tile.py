"""Sliding Tile Attention: windows of whole tiles that slide tile by tile."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Where, Window, param
from attnctrl.controls.sparse.common import BOTH, LATENTS, Sequence, Sparse, block_size, falls_back, sink_frames
from attnctrl.controls.sparse.tiles import checked, clipped, sees_frames, tile_counts, tile_shape, window_sizes
from attnctrl.kernels.blocks_grid import axis_windows, tile_order
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid


def tile_windows(tiles: Grid, window: Grid) -> torch.Tensor:
    """Which tiles each tile sees, bool (tiles, tiles): those of the window around it, shifted to lie in the grid.

    tiles: how many there are along (frames, height, width); window: how many of them are seen.
    """
    near = axis_windows(tiles, window, (1, 1, 1))
    return reduce(torch.kron, (one.int() for one in near)).bool()


@dataclass(frozen=True)
class SlidingTile(Control):
    """Sliding Tile Attention (arXiv 2502.04507): queries of a tile see the tiles of a window around theirs, whole.

    tile: tokens along (frames, height, width); None for one that fills a block. The paper's (6, 8, 8) takes three
    blocks of 128. tiles: how many of them along each axis are seen; None for the grid's own shape at `density`. The
    official code searches a window for each head offline; here one serves for all, and Draft chooses online.

    Tiles at the end of an axis may be smaller, and count as one. Text sees all and is seen by all; a sink's frames
    are seen by all, in whole blocks. Families: all with self- or joint attention among latents.
    """

    paper: ClassVar[str] = "arXiv 2502.04507"
    fixes: ClassVar[str] = "slow video generation"

    density: float = param(0.2, "share of the tiles that a query sees, where their number is not given", 0.001, 1)
    tile: tuple[int, int, int] | None = param(None, "tokens of a tile along frames, height, width")
    tiles: tuple[int, int, int] | None = param(None, "tiles seen along frames, height, width")
    block: int = block_size(128)
    sink: int = sink_frames(0)
    fall_back: bool = falls_back()
    window: Window = field(default=Window(0.3, 1.0), kw_only=True)
    where: Where = field(default=LATENTS, kw_only=True)
    branches: tuple[str, ...] = field(default=BOTH, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checked(self.name, "tile", self.tile)
        checked(self.name, "tiles", self.tiles)

    def begin(self, sampling: Sampling) -> Sparse:
        return Sparse(self, sampling)

    def sizes(self, grid: Grid) -> tuple[Grid, Grid, Grid]:
        """(tile, tiles along each axis, tiles of a window along each axis) on a grid."""
        tile = clipped(self.tile or tile_shape(grid, self.block), grid)
        count = tile_counts(grid, tile)
        return tile, count, clipped(self.tiles or window_sizes(count, self.density), count)

    def attend(self, call: Call, state: Any) -> torch.Tensor | None:
        sequence, device = Sequence.of(call, self.name), call.query.device

        def make() -> Any:
            grid = sequence.grid
            tile, count, window = self.sizes(grid)
            order, axis = tile_order(grid, tile, self.block)
            each = torch.tensor([-(-tokens // axis.size) for tokens in axis.segments])
            visited = tile_windows(count, window).repeat_interleave(each, dim=0).repeat_interleave(each, dim=1)
            visited |= sees_frames(order, axis.block_of_token()[0], axis.blocks, grid[1] * grid[2], self.sink)
            return sequence.fixed(axis, visited[None, None], device), sequence.order(order.to(device))

        mask, order = state.once((sequence, device), make)
        return state.attend(call, mask, self.fall_back, order)
