"""Attention under token groups, materialised in float32: the definition that every other form is held to."""

from __future__ import annotations

import torch

from attnctrl.kernels.groups import TokenGroups


def check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: TokenGroups | None, scale: float
) -> None:
    """Raise ValueError, with a sentence, unless the arguments of `group_attention` fit together."""
    if not query.dim() == key.dim() == value.dim() == 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            "query, key and value are (batch, heads, tokens, head_dim), key and value alike but for head_dim: got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    if (*query.shape[:2], query.shape[3]) != (*key.shape[:2], key.shape[3]):
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in batch, heads or head_dim: repeat the "
            "keys where several heads share them."
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}: use one element type."
        )
    if not scale > 0:
        raise ValueError(f"scale is {scale}: it must be positive, usually head_dim ** -0.5.")
    if groups is None:
        return
    if (groups.queries, groups.keys) != (query.shape[2], key.shape[2]):
        raise ValueError(
            f"The groups are for {groups.queries} queries x {groups.keys} keys, the attention has "
            f"{query.shape[2]} x {key.shape[2]}."
        )
    if groups.batch not in (1, query.shape[0]):
        raise ValueError(f"The groups are for a batch of {groups.batch}, the attention has {query.shape[0]}.")
    if groups.device != query.device:
        raise ValueError(f"The groups are on {groups.device}, the query on {query.device}: move them with .to().")


def precision(query: torch.Tensor) -> torch.dtype:
    """What sums are kept in: float32, or float64 for float64 (gradient checks)."""
    return torch.promote_types(query.dtype, torch.float32)


def group_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: TokenGroups,
    scale: float,
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(scale * query key^T over the visible keys) value, and the natural logarithm of the softmax's sum.

    query: (batch, heads, queries, head_dim); key, value: (batch, heads, keys, head_dim), where value may have another
    head_dim. Returns the output, (batch, heads, queries, head_dim of value), and lse, float32 (batch, heads, queries).
    A query that sees nothing has output 0 and lse -inf, and no gradient. Allocates queries x keys.
    """
    check(query, key, value, groups, scale)
    exact = precision(query)
    scores = torch.matmul(query.to(exact), key.to(exact).transpose(-1, -2)) * scale
    scores = scores.masked_fill(~groups.dense(), float("-inf"))
    blind = (scores == float("-inf")).all(dim=-1, keepdim=True)
    top = scores.detach().amax(dim=-1, keepdim=True).masked_fill(blind, 0.0)
    weights = (scores - top).exp()
    # 1 in place of the empty sum: neither the quotient nor the logarithm, nor their gradients, meets a zero.
    total = weights.sum(dim=-1, keepdim=True).masked_fill(blind, 1.0)
    output = torch.matmul(weights / total, value.to(exact)).to(query.dtype)
    lse = (total.log() + top).masked_fill(blind, float("-inf"))
    return output, lse.squeeze(-1)
