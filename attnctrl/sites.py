"""What an attention layer is (`Site`) and what one call of it holds (`Call`), free of any model library.

Axis names used throughout: batch, heads, tokens (queries or keys), head_dim, frames, height, width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from attnctrl.kernels.groups import TokenGroups

Grid = tuple[int, int, int]
"""Latent tokens as (frames, height, width); pictures have one frame."""

# The keywords under which the run hands things to processors, where a model passes keywords on.
MASKS, BLOCK_MASKS = "attnctrl_masks", "attnctrl_block_masks"


@dataclass(frozen=True)
class Site:
    """One attention layer of a model.

    name: module path. kind: "self", "cross" or "joint". block: "down", "mid", "up" or "" (transformers).
    order: position in the forward pass. depth: how often the latent grid was halved before this layer. expert: number
    of the denoiser, in pipelines that have several for different steps.
    """

    name: str
    kind: str
    block: str
    order: int
    depth: int = 0
    expert: int = 0

    def grid(self, latents: Grid) -> Grid:
        """The token grid of this site for latents of grid `latents`; halving rounds up, as strided convolutions do."""
        frames, height, width = latents
        for _ in range(self.depth):
            height, width = (height + 1) // 2, (width + 1) // 2
        return frames, height, width


@dataclass(frozen=True)
class TokenLayout:
    """Where latent and text tokens stand in one sequence; either slice may be empty.

    grid gives the latent tokens' (frames, height, width), None where the sequence holds text alone.
    """

    latent: slice
    text: slice
    grid: Grid | None = None

    @classmethod
    def of_latents(cls, grid: Grid) -> TokenLayout:
        count = grid[0] * grid[1] * grid[2]
        return cls(latent=slice(0, count), text=slice(count, count), grid=grid)

    @classmethod
    def of_text(cls, count: int) -> TokenLayout:
        return cls(latent=slice(0, 0), text=slice(0, count))


@dataclass(frozen=True)
class Step:
    """One step of a sampling run.

    index: position in the scheduler's schedule. total: length of that schedule. timestep: the scheduler's value.
    progress: index / total in [0, 1): a fraction of the *noise schedule*, so that an image-to-image run of
    strength 0.5 starts at 0.5. noise: timestep as a fraction of the training schedule, 1 = pure noise.
    """

    index: int
    total: int
    timestep: float
    noise: float

    @property
    def progress(self) -> float:
        return self.index / max(self.total, 1)


@dataclass(frozen=True)
class Stream:
    """Another context that the queries attend to: its own softmax, merged by weight, or more keys of the layer's own.

    key, value: (batch, heads, keys, head_dim). weight: (batch, 1, queries, 1), in [0, 1]. offset: with it the keys
    stand in one softmax with the layer's own keys, (batch, 1, queries, 1) or a number added to their logits, -inf for
    queries that do not see them; `weight` is not read then. rows: the rows of the batch that look, to which all
    these tensors belong; None for all. mask: which of these keys
    each query sees, None for all; the masks of controls speak of the first look. With token groups, for a second look
    at the layer's own keys, what the model itself hides is hidden there too; a tensor, boolean or additive and
    broadcastable to (batch, heads, queries, keys), says everything. query: who looks, the call's own query if None.
    """

    key: torch.Tensor
    value: torch.Tensor
    weight: torch.Tensor | float
    mask: TokenGroups | torch.Tensor | None = None
    query: torch.Tensor | None = None
    offset: torch.Tensor | float | None = None
    rows: slice | None = None


@dataclass(frozen=True)
class Call:
    """One call of an attention layer for the rows of one guidance branch.

    query, key, value: (batch, heads, tokens, head_dim), after normalisation and rotary embedding.
    mask: the model's own mask, additive or boolean, broadcastable to (batch, heads, queries, keys).
    branch: "cond", "uncond" or "image". project: text embeddings (batch, tokens, channels) -> this layer's key, value.
    streams: further contexts; when there are any, the layer's own context counts with `base_weight`. seen: in the
    attend point, what may be seen: `mask` and the masks of all controls together, a tensor like it or token groups.
    """

    site: Site
    step: Step
    branch: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    queries: TokenLayout
    keys: TokenLayout
    mask: torch.Tensor | None = None
    project: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    streams: tuple[Stream, ...] = ()
    base_weight: torch.Tensor | float = 1.0
    seen: torch.Tensor | TokenGroups | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def change(self, **fields: Any) -> Call:
        """A copy with some fields replaced."""
        return replace(self, **fields)

    def shared(self, rest: torch.Tensor, *streams: Stream) -> Call:
        """A copy with further streams, whose weights and `rest`, (batch, 1, queries, 1), sum to 1.

        What earlier controls shared out is scaled by `rest` along with the layer's own context, so that all weights
        still sum to 1.
        """
        earlier = tuple(replace(s, weight=s.weight * (rest if s.rows is None else rest[s.rows])) for s in self.streams)
        return replace(self, streams=(*earlier, *streams), base_weight=self.base_weight * rest)
