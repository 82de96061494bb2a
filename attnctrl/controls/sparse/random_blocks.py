"""Random blocks: the floor that a sparse method must beat at equal density."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Where, Window, param
from attnctrl.controls.sparse.common import BOTH, LATENTS, Sparse, block_size, falls_back, sink_frames
from attnctrl.controls.sparse.selection import Tiles
from attnctrl.controls.sparse.tiles import FLAT
from attnctrl.sampling import Sampling
from attnctrl.sites import Call


@dataclass(frozen=True)
class RandomBlocks(Control):
    """As many random blocks in every row as `density` says: what a choice of blocks is worth is measured against this.

    Every site and step has its own draw, the same for both guidance branches and in every run with this seed. Tiles,
    the diagonal, the sink and text are as in Draft. Families: as Draft.
    """

    paper: ClassVar[str] = "none: a floor to measure against"
    fixes: ClassVar[str] = "nothing: the cost of a sparse method without its choice"

    density: float = param(0.25, "share of the blocks that is visited", 0.001, 1)
    seed: int = param(0, "of the draw", 0, 2**31 - 1)
    block: int = block_size(128)
    sink: int = sink_frames(0)
    fall_back: bool = falls_back()
    window: Window = field(default=Window(), kw_only=True)
    where: Where = field(default=LATENTS, kw_only=True)
    branches: tuple[str, ...] = field(default=BOTH, kw_only=True)

    def begin(self, sampling: Sampling) -> Sparse:
        return Sparse(self, sampling)

    def attend(self, call: Call, state: Any) -> torch.Tensor | None:
        tiles = Tiles.of(call, state, FLAT[self.block], self.block, self.sink)
        generator = torch.Generator().manual_seed(hash((self.seed, call.step.index, call.site.order)) % 2**63)
        shape = 1, call.query.shape[1], tiles.axis.blocks, tiles.axis.blocks
        scores = torch.rand(shape, generator=generator).to(call.query.device)
        return state.attend(call, tiles.top(scores, self.density, "row"), self.fall_back, tiles.order)
