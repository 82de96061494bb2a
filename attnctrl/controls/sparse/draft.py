"""DraftAttention: attention between pooled tokens chooses the blocks that are visited."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Where, Window, param
from attnctrl.controls.sparse.common import BOTH, Sparse, block_size, falls_back, sink_frames
from attnctrl.controls.sparse.selection import Tiles
from attnctrl.controls.sparse.tiles import FLAT
from attnctrl.kernels import draft_map
from attnctrl.sampling import Sampling
from attnctrl.sites import Call


@dataclass(frozen=True)
class Draft(Control):
    """DraftAttention (arXiv 2505.14708): the blocks with the highest attention between their mean query and mean key.

    Tokens are reordered so that a pool of 8x16 tokens of one frame is a block (8x8 in blocks of 64, 4x4 in those of
    16); softmax(scale * mean(query) mean(key)^T) among the latents is the draft map, for each head, picture and
    guidance branch; the highest share `density` of it is visited, or with `mass`, which the paper has not, as many
    blocks as hold that share of its sum. scope "head", as in the official code: the blocks of
    a head compete in its whole map; "row": within their row. Defaults: Wan 2.1; HunyuanVideo density=0.1 and the first
    two double blocks dense (where=Where(kinds=("joint",), skip=2)).

    Departures: a block always visits itself, without which a row may be left with nothing. Of equal values as many are
    kept as the density says; the code keeps all of them. Pools at the end of an axis may be smaller, where the code
    refuses grids that 8x16 does not divide; they count like whole ones.

    Text sees all and is seen by all, and has no part in the map. Families: Wan, HunyuanVideo, and all with self- or
    joint attention among latents.
    """

    paper: ClassVar[str] = "arXiv 2505.14708"
    fixes: ClassVar[str] = "slow video generation"

    density: float = param(0.25, "share of the blocks that is visited", 0.001, 1)
    mass: float = param(
        0.0, "share of the map's sum that is visited, by as few blocks as hold it; 0: density holds", 0, 1
    )
    scope: str = param("head", "blocks compete within a head's whole map, or within their row", choices=("head", "row"))
    block: int = block_size(128)
    sink: int = sink_frames(0)
    fall_back: bool = falls_back()
    window: Window = field(default=Window(0.29, 1.0), kw_only=True)
    where: Where = field(default=Where(kinds=("self", "joint"), skip=1), kw_only=True)
    branches: tuple[str, ...] = field(default=BOTH, kw_only=True)

    def begin(self, sampling: Sampling) -> Sparse:
        return Sparse(self, sampling)

    def attend(self, call: Call, state: Any) -> torch.Tensor | None:
        tiles = Tiles.of(call, state, FLAT[self.block], self.block, self.sink)
        query, key = tiles.ordered(call)
        scores = draft_map(tiles.latents(query), tiles.latents(key), tiles.axis, tiles.axis, call.scale)
        mask = tiles.top(scores, self.density, self.scope, self.mass)  # type: ignore[arg-type]
        return state.attend(call, mask, self.fall_back, tiles.order, (query, key))
