"""Oracle blocks: those that hold the most attention, known from full attention. What a choice by mass can reach."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Where, Window, param
from attnctrl.controls.sparse.common import BOTH, LATENTS, Sparse, block_size, falls_back, sink_frames
from attnctrl.controls.sparse.selection import Tiles
from attnctrl.controls.sparse.tiles import FLAT
from attnctrl.kernels import BlockAxis
from attnctrl.sampling import Sampling
from attnctrl.sites import Call

SCORES = 2**24
"""Scores that are materialised at a time."""


def block_mass(query: torch.Tensor, key: torch.Tensor, axis: BlockAxis, scale: float) -> torch.Tensor:
    """The attention that a block of keys gets from a block of queries: float32 (batch, heads, blocks, blocks).

    query, key: (batch, heads, tokens, head_dim). Of each row the values sum to the block's number of queries.
    """
    batch, heads, tokens, _ = query.shape
    block = axis.block_of_token(query.device)[0]
    found = query.new_zeros(batch, heads, axis.blocks, axis.blocks, dtype=torch.float32)
    for part in torch.arange(tokens, device=query.device).split(max(1, SCORES // (batch * heads * tokens))):
        probs = (query[:, :, part] @ key.transpose(-1, -2)).float().mul_(scale).softmax(dim=-1)
        by_key = probs.new_zeros(batch, heads, len(part), axis.blocks).index_add_(3, block, probs)
        found.index_add_(2, block[part], by_key)
    return found


@dataclass(frozen=True)
class OracleBlocks(Control):
    """The blocks that hold the most attention among the latents, found by computing all of it: the best choice.

    It costs more than full attention: it is there to measure others by, with the same tiles, diagonal, sink and text
    as Draft. The best by mass, that is: where attention is nearly even, what holds a little more of it is not a fair
    sample of the values, and random blocks may come nearer to their mean. scope, mass: as in Draft. Families: as Draft.
    """

    paper: ClassVar[str] = "none: a ceiling to measure against"
    fixes: ClassVar[str] = "nothing: the best choice of blocks, at more than the full cost"

    density: float = param(0.25, "share of the blocks that is visited", 0.001, 1)
    mass: float = param(
        0.0, "share of the map's sum that is visited, by as few blocks as hold it; 0: density holds", 0, 1
    )
    scope: str = param("head", "blocks compete within a head's whole map, or within their row", choices=("head", "row"))
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
        query, key = tiles.ordered(call)
        with torch.no_grad():
            scores = block_mass(tiles.latents(query), tiles.latents(key), tiles.axis, call.scale)
        mask = tiles.top(scores, self.density, self.scope, self.mass)  # type: ignore[arg-type]
        return state.attend(call, mask, self.fall_back, tiles.order, (query, key))
