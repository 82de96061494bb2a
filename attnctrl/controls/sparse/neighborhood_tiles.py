"""Generalized neighborhood attention: every query sees a window of the grid around it, cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Where, Window, param
from attnctrl.controls.sparse.common import BOTH, LATENTS, Sequence, Sparse, block_size, falls_back, sink_frames
from attnctrl.controls.sparse.tiles import checked, clipped, sees_frames, tile_counts, tile_shape, window_sizes
from attnctrl.kernels import SparseBlocks
from attnctrl.kernels.blocks_grid import window_blocks
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid


def neighborhood(
    grid: Grid, tile: Grid, window: Grid, stride: Grid, sink: int = 0
) -> tuple[torch.Tensor, SparseBlocks]:
    """The latents' order, int64 (latents,), and the mask in it: `window_blocks`, and `sink` first frames for all."""
    order, mask = window_blocks(grid, tile, window, stride)
    if sink:
        block = mask.key_axis.block_of_token()[0]
        held = sees_frames(order, block, mask.key_axis.blocks, grid[1] * grid[2], sink)
        pattern = None if mask.pattern is None else mask.pattern.masked_fill(held, 0)
        mask = replace(mask, visited=mask.visited | held, pattern=pattern)
    return order, mask


@dataclass(frozen=True)
class NeighborhoodTiles(Control):
    """Generalized neighborhood attention (arXiv 2504.16922): each query sees a window around it, of a fixed size.

    Queries go in runs of `stride` along each axis; a run sees the `extent` tokens around its middle, shifted to lie in
    the grid. A stride of a tile and an extent of whole tiles leaves no tile half seen: the fastest choice, and the
    default. extent: tokens along (frames, height, width), None for the grid's own shape at `density`; stride: None for
    a tile. The paper's settings: FLUX.1 at 4096x4096 extent=(1, 80, 80), stride=(1, 16, 16); HunyuanVideo
    extent=(18, 24, 24), stride=(16, 8, 8), with tiles of 16x8 and 2x8x8, window from a third of the run on.

    Extents larger than a grid are clipped to it. A sink's frames are seen by all, in the whole tiles that hold them.
    Text sees all and is seen by all. Families: all with self- or joint attention among latents; UNets at their finer
    layers.
    """

    paper: ClassVar[str] = "arXiv 2504.16922"
    fixes: ClassVar[str] = "slow generation of videos and large pictures"

    density: float = param(0.2, "share of the latents that a query sees, where no extent is given", 0.001, 1)
    extent: tuple[int, int, int] | None = param(None, "tokens seen along frames, height, width")
    stride: tuple[int, int, int] | None = param(None, "queries along frames, height, width that share a neighbourhood")
    block: int = block_size(128)
    sink: int = sink_frames(0)
    fall_back: bool = falls_back()
    window: Window = field(default=Window(0.3, 1.0), kw_only=True)
    where: Where = field(default=LATENTS, kw_only=True)
    branches: tuple[str, ...] = field(default=BOTH, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checked(self.name, "extent", self.extent)
        checked(self.name, "stride", self.stride)

    def begin(self, sampling: Sampling) -> Sparse:
        return Sparse(self, sampling)

    def sizes(self, grid: Grid) -> tuple[Grid, Grid, Grid]:
        """(tile, extent, stride) on a grid."""
        tile = tile_shape(grid, self.block)
        # Around the middle of a tile an odd number of tiles leaves none half seen.
        frames, height, width = window_sizes(tile_counts(grid, tile), self.density, odd=True)
        whole = frames * tile[0], height * tile[1], width * tile[2]
        asked = clipped(self.extent or whole, grid)
        return tile, asked, clipped(self.stride or tile, asked)

    def attend(self, call: Call, state: Any) -> torch.Tensor | None:
        sequence, device = Sequence.of(call, self.name), call.query.device

        def make() -> Any:
            order, found = neighborhood(sequence.grid, *self.sizes(sequence.grid), self.sink)
            mask = sequence.fixed(found.key_axis, found.visited, device, found.pattern, found.patterns)
            return mask, sequence.order(order.to(device))

        mask, order = state.once((sequence, device), make)
        return state.attend(call, mask, self.fall_back, order)
