"""Columns of the attention map for chosen keys: exp(scale * q.k - lse), queries x chosen keys and no more."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from attnctrl.kernels.groups_reference import precision


def column_probabilities(
    query: torch.Tensor,
    key_selected: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The probabilities that the queries give to some keys: float32 (batch, heads, queries, selected).

    query: (batch, heads, queries, head_dim); key_selected: (batch, heads, selected, head_dim), rows of the key that
    `lse`, the natural log-sum-exp (batch, heads, queries), was computed with, at the same scale. mask: bool or
    additive, broadcastable to the result, where a mask applied: `TokenGroups.visible(indices)`.

    Differentiable in query, key and lse. The gradient is that of the whole softmax, every key's part included, when
    lse comes from an attention that takes a gradient for it: `attention_with_lse` or `group_attention`.
    """
    exact = precision(query)
    scores = torch.matmul(query.to(exact), key_selected.to(exact).transpose(-1, -2)) * scale
    # Nothing visible at all: probabilities 0, and no gradient of exp(score + inf).
    sums = torch.where(lse == float("-inf"), float("inf"), lse)
    # Before exp, not after: a hidden key's score may lie far above the sum of those that are seen.
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores - sums[..., None]).exp()


def mean_columns(
    query: torch.Tensor,
    key_selected: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean over heads of `column_probabilities`: float32 (batch, 1, queries, selected).

    One head at a time, computed again for gradients, so that memory does not grow with the number of heads.
    """
    heads = query.shape[1]
    total: torch.Tensor | float = 0.0
    for h in range(heads):
        one = slice(h, h + 1)
        own = mask if mask is None or mask.shape[1] == 1 else mask[:, one]
        parts = (query[:, one], key_selected[:, one], lse[:, one], scale, own)
        total = total + (
            checkpoint(column_probabilities, *parts, use_reentrant=False)
            if torch.is_grad_enabled()
            else column_probabilities(*parts)
        )
    return total / heads  # type: ignore[return-value]
