"""What the controls that choose blocks in every call share: tiles that are blocks, and blocks that are always kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnctrl.controls.sparse.common import Sequence, Sparse
from attnctrl.controls.sparse.tiles import clipped, sees_frames
from attnctrl.kernels import BlockAxis, SparseBlocks, TokenOrder, mass_blocks, top_blocks
from attnctrl.kernels.blocks_grid import tile_order
from attnctrl.kernels.blocks_select import Scope
from attnctrl.sites import Call, Grid


@dataclass(frozen=True)
class Tiles:
    """The latents of a sequence in tiles, a block each. forced: bool (blocks, blocks), visited whatever the scores."""

    sequence: Sequence
    axis: BlockAxis
    order: TokenOrder
    forced: torch.Tensor

    @classmethod
    def of(cls, call: Call, state: Sparse, tile: Grid, block: int, sink: int) -> Tiles:
        """The tiles of a call's sequence. The diagonal is forced, lest a row be left with nothing, and the sink."""
        sequence, device = Sequence.of(call, state.name), call.query.device

        def make() -> Tiles:
            grid = sequence.grid
            order, axis = tile_order(grid, clipped(tile, grid), block)
            forced = torch.eye(axis.blocks, dtype=torch.bool)
            forced |= sees_frames(order, axis.block_of_token()[0], axis.blocks, grid[1] * grid[2], sink)
            return cls(sequence, axis, sequence.order(order.to(device)), forced.to(device))

        return state.once((sequence, device), make)

    def ordered(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key in the order of the tiles, text where it was."""
        return self.order.apply(call.query), self.order.apply(call.key)

    def latents(self, tensor: torch.Tensor) -> torch.Tensor:
        """Those of the latents, of (batch, heads, tokens, channels)."""
        return tensor[:, :, self.sequence.before : self.sequence.before + self.sequence.latents]

    def top(self, scores: torch.Tensor, density: float, scope: Scope, mass: float = 0.0) -> SparseBlocks:
        """The mask with the highest scores, (batch, heads, blocks, blocks), at a density among the latents.

        mass: where it is above 0, the fewest blocks that hold this share of the scores instead.
        """
        if mass > 0:
            return self.sequence.blocks(self.axis, mass_blocks(scores, mass, self.forced, scope))
        return self.sequence.chosen(self.axis, top_blocks(scores, density, self.forced, scope), density)
