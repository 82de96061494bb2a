"""Attention under sparse blocks, materialised in float32: the definition that every other form is held to."""

from __future__ import annotations

import torch

from attnctrl.kernels import groups_reference
from attnctrl.kernels.blocks import SparseBlocks


def check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: SparseBlocks, scale: float) -> None:
    """Raise ValueError, with a sentence, unless the arguments of `block_attention` fit together."""
    groups_reference.check(query, key, value, None, scale)
    if (mask.queries, mask.keys) != (query.shape[2], key.shape[2]):
        raise ValueError(
            f"The blocks are for {mask.queries} queries x {mask.keys} keys, the attention has "
            f"{query.shape[2]} x {key.shape[2]}."
        )
    for name, mine, wanted in (("a batch", mask.batch, query.shape[0]), ("heads", mask.heads, query.shape[1])):
        if mine not in (1, wanted):
            raise ValueError(f"The blocks are for {name} of {mine}, the attention has {wanted}: give that, or 1.")
    if mask.device != query.device:
        raise ValueError(f"The blocks are on {mask.device}, the query on {query.device}: move them with .to().")


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: SparseBlocks,
    scale: float,
    with_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(scale * query key^T over the visible keys) value, and the natural logarithm of the softmax's sum.

    query: (batch, heads, queries, head_dim); key, value: (batch, heads, keys, head_dim). Returns the output, like
    query, and lse, float32 (batch, heads, queries). A query that sees nothing has output 0 and lse -inf, and no
    gradient. Allocates queries x keys.
    """
    check(query, key, value, mask, scale)
    return groups_reference.masked_attention(query, key, value, mask.dense(), scale)
