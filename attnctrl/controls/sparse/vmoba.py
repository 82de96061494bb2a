"""VMoBA: every query chooses the chunks of keys that it attends to; chunks are of time, space, or both, by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Any, ClassVar, NamedTuple

import torch

from attnctrl.control import Control, Where, Window, param
from attnctrl.controls.sparse.chunks import chunk_attention, chunk_means, near_chunks, top_chunks
from attnctrl.controls.sparse.common import BOTH, LATENTS, Sequence, Sparse, falls_back, moved
from attnctrl.controls.sparse.tiles import checked, clipped
from attnctrl.errors import ControlError
from attnctrl.kernels import TokenOrder, padded
from attnctrl.kernels.blocks_grid import tile_order
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid

PAYS_FROM = 32768
"""On a GPU, by the authors' account, it is faster than full attention from about so many tokens on."""
CPU_COST = 1.5
"""What a pair costs here, in units of fused attention on a CPU, roughly."""


class Partition(NamedTuple):
    """The sequence in chunks: its order; the tokens of each chunk; each token's chunk, int64 (tokens,).

    latents: which chunks hold latents, the others being text, which all see and which sees all.
    """

    order: TokenOrder
    sizes: tuple[int, ...]
    chunk: torch.Tensor
    latents: slice


def partition(sequence: Sequence, tile: Grid, device: torch.device) -> Partition:
    """Chunks of `tile` = (frames, height, width) tokens; smaller at the end of an axis."""
    order, axis = tile_order(sequence.grid, clipped(tile, sequence.grid), 16)
    sizes = tuple(n for n in (sequence.before, *axis.segments, sequence.after) if n)
    chunk = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    first = 1 if sequence.before else 0
    latents = slice(first, first + len(axis.segments))
    return Partition(sequence.order(order.to(device)), sizes, chunk.to(device), latents)


@dataclass(frozen=True)
class VMoBA(Control):
    """VMoBA (arXiv 2506.23858): a query sees its own chunk of keys and those whose mean key is most like it.

    Layers take turns: chunks of `frames` whole frames; of `area` = (height, width) through all frames; of `volume` =
    (frames, height, width). mode "threshold": the fewest chunks that hold the share `threshold` of the similarity
    query . mean key, brought to [0, 1]; "top": the share `density` of the chunks. scope "query": each query for itself;
    "head": the queries of a head together, so that some get more. In either mode a query keeps its own chunk, and in
    "threshold" one more at least. Defaults: those for Wan 2.1 1.3B at 480x832, dense in the first quarter of the run.

    The order of the layers is by their place among the denoiser's layers of attention among latents. Chunks at the end
    of an axis may be smaller, where the official code refuses such grids. Queries of a chunk are gathered, on a GPU
    waiting for their number: the authors find it faster than full attention from 33 thousand tokens on. Gradients are
    exact; the choice has none.

    Text, a chunk of its own, sees all and is seen by all. Families: Wan, and all with self- or joint attention.
    """

    paper: ClassVar[str] = "arXiv 2506.23858"
    fixes: ClassVar[str] = "slow video generation"

    mode: str = param(
        "threshold", "chunks by their share of the similarity, or by number", choices=("threshold", "top")
    )
    threshold: float = param(0.25, "share of the similarity that is kept", 0, 1)
    density: float = param(0.18, "share of the chunks that is kept in mode top", 0.001, 1)
    scope: str = param("query", "who chooses: each query, or all of a head together", choices=("query", "head"))
    frames: int = param(2, "frames of a chunk in the first kind of layers", 1, 64)
    area: tuple[int, int] = param((3, 4), "tokens of a chunk of a frame along height, width")
    volume: tuple[int, int, int] = param((4, 6, 4), "tokens of a chunk along frames, height, width")
    fall_back: bool = falls_back()
    window: Window = field(default=Window(0.24, 1.0), kw_only=True)
    where: Where = field(default=LATENTS, kw_only=True)
    branches: tuple[str, ...] = field(default=BOTH, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checked(self.name, "volume", self.volume)
        checked(self.name, "area (with a 1 before it)", (1, *self.area))

    def begin(self, sampling: Sampling) -> Sparse:
        state, counts = Sparse(self, sampling), dict[int, int]()
        for site in sorted(LATENTS.select(sampling.sites, sampling.latent_grid), key=lambda site: site.order):
            state.made["layer", site.name] = counts.setdefault(site.expert, 0)
            counts[site.expert] += 1
        return state

    def tile(self, layer: int, grid: Grid) -> Grid:
        """The chunk of the layer's kind."""
        return ((self.frames, *grid[1:]), (grid[0], *self.area), self.volume)[layer % 3]

    def choose(self, query: torch.Tensor, means: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """The chunks of latents that each query sees: bool (batch, heads, queries, chunks)."""
        gate = query.float() @ means.transpose(-1, -2)
        if self.mode == "threshold":
            return near_chunks(gate, own, self.threshold, self.scope == "query")
        return top_chunks(gate, own, ceil(self.density * gate.shape[3] * (1 - 1e-12)), self.scope == "query")

    def attend(self, call: Call, state: Any) -> torch.Tensor | None:
        sequence, device = Sequence.of(call, self.name), call.query.device
        if self.fall_back and device.type != "cpu" and sequence.tokens < PAYS_FROM:
            state.visited(call, 1.0, "full", f"fewer than {PAYS_FROM} tokens")
            return None
        tile = self.tile(state.made["layer", call.site.name], sequence.grid)
        parts = state.once((sequence, tile, device), lambda: partition(sequence, tile, device))
        query, key = (parts.order.apply(tensor) for tensor in (call.query, call.key))
        chosen = self.chosen(query.detach(), key.detach(), parts, sequence)
        sizes = torch.tensor(parts.sizes, device=device, dtype=torch.float64)
        share = (chosen.double() @ sizes).mean() / sequence.tokens
        if self.fall_back and device.type == "cpu" and share * CPU_COST >= 1:
            state.visited(call, 1.0, "full", f"a density above {1 / CPU_COST:.2f}")
            return None
        hidden = self.hidden(call, state, parts.order)
        value = moved(call.value, parts.order)
        output = chunk_attention(query, key, value, chosen, parts.sizes, call.scale, hidden)
        state.visited(call, float(share) if device.type == "cpu" else share, "chunks")
        return parts.order.restore(output)

    def chosen(self, query: torch.Tensor, key: torch.Tensor, parts: Partition, sequence: Sequence) -> torch.Tensor:
        """What every token of the sequence sees: bool (batch, heads, tokens, chunks)."""
        every = torch.ones(*query.shape[:3], len(parts.sizes), dtype=torch.bool, device=query.device)
        latents = slice(sequence.before, sequence.before + sequence.latents)
        chunk = parts.chunk[latents] - parts.latents.start
        count = parts.latents.stop - parts.latents.start
        own = torch.nn.functional.one_hot(chunk, count).bool()
        every[:, :, latents, parts.latents] = self.choose(
            query[:, :, latents], chunk_means(key[:, :, latents], chunk, count), own
        )
        return every

    def hidden(self, call: Call, state: Sparse, order: TokenOrder) -> torch.Tensor | None:
        """Hidden keys in the order of the chunks: bool (batch or 1, keys)."""
        if call.seen is None:
            return None
        if isinstance(call.seen, torch.Tensor) and call.seen.shape[1:3] == (1, 1):
            return padded(state.padding, call.seen, lambda hidden: hidden)[:, order.order[0]]
        raise ControlError(
            f"{self.name} cannot work beside a mask that differs between queries, as another control has at "
            f"{call.site.name}: give one of the two other sites (where) or steps (window)."
        )
