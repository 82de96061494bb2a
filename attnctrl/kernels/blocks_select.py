"""Which blocks to visit, from scores of blocks: pooled attention, the densest part of a row, the largest mass.

Every function returns tensors on the device and waits for nothing.
"""

from __future__ import annotations

from math import ceil
from typing import Literal

import torch

from attnctrl.kernels.blocks_axis import BlockAxis

Scope = Literal["row", "head"]
"""Whether blocks compete within their row, or within the whole map of a head."""


def block_means(tensor: torch.Tensor, axis: BlockAxis) -> torch.Tensor:
    """The mean of each block's tokens: float32 (batch, heads, blocks, channels) of (batch, heads, tokens, channels)."""
    sums = axis.cut(tensor).sum(dim=3, dtype=torch.float32)
    return sums / axis.bounds(tensor.device)[1][:, None]


def draft_map(
    query: torch.Tensor, key: torch.Tensor, query_axis: BlockAxis, key_axis: BlockAxis, scale: float
) -> torch.Tensor:
    """Attention between block means: float32 (batch, heads, query blocks, key blocks), each row of sum 1.

    softmax(scale * mean(query) mean(key)^T), DraftAttention's low-resolution map (arXiv 2505.14708) where a block is
    one cell of its pooling. A short block counts like a whole one.
    """
    means = (block_means(query, query_axis), block_means(key, key_axis))
    return (means[0] @ means[1].transpose(-1, -2) * scale).softmax(dim=-1)


def top_blocks(
    scores: torch.Tensor, density: float, forced: torch.Tensor | None = None, scope: Scope = "row"
) -> torch.Tensor:
    """The blocks with the highest scores: bool, the shape of scores, (batch, heads, query blocks, key blocks).

    density: the share of blocks to keep, above 0 to 1, of each row or of each head's whole map; rounded up to whole
    blocks. Exactly so many are kept, of equal scores any. forced: bool that broadcasts to scores, blocks kept whatever
    their score; they count, so that the density holds unless they alone exceed it. A row may lose all its blocks
    with scope "head": force the diagonal.

    Raises:
        ValueError: a density that is not above 0 and at most 1, or another scope.
    """
    _check_share("density", density)
    ranked = scores if forced is None else scores.masked_fill(forced, float("inf"))
    flat = _flat(ranked, scope)
    count = max(1, ceil(density * flat.shape[-1] * (1 - 1e-12)))  # less a rounding: 0.07 of 100 is 7, not 8
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, flat.topk(count, sorted=False).indices, True)
    kept = kept.view(scores.shape)
    return kept if forced is None else kept | forced


def mass_blocks(
    scores: torch.Tensor, mass: float, forced: torch.Tensor | None = None, scope: Scope = "row"
) -> torch.Tensor:
    """The fewest blocks that hold a share of the mass: bool, the shape of scores, (batch, heads, rows, blocks).

    scores: not negative, such as `draft_map`. mass: above 0 to 1, of the sum of each row, or of each head's whole map.
    The block in which the share is reached is kept too, so that every row (or head) keeps one at least. forced: as in
    `top_blocks`; their mass counts first.

    Raises:
        ValueError: a mass that is not above 0 and at most 1, or another scope.
    """
    _check_share("mass", mass)
    flat = _flat(scores, scope)
    rank = flat if forced is None else _flat(scores.masked_fill(forced, float("inf")), scope)
    order = rank.argsort(dim=-1, descending=True)
    ordered = flat.gather(-1, order)
    before = ordered.cumsum(dim=-1) - ordered
    # Two ways to round one sum: with all the mass asked for, all that has any is kept.
    reached = before >= mass * ordered.sum(dim=-1, keepdim=True) if mass < 1 else ordered <= 0
    reached[..., 0] = False
    kept = torch.zeros_like(reached).scatter_(-1, order, ~reached).view(scores.shape)
    return kept if forced is None else kept | forced


def _flat(scores: torch.Tensor, scope: Scope) -> torch.Tensor:
    if scope not in ("row", "head"):
        raise ValueError(f'scope is "{scope}": choose "row" or "head".')
    return scores if scope == "row" else scores.flatten(2)


def _check_share(name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"{name} is {share}: it must be above 0 and at most 1.")
