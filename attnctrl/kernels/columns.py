"""Columns of the attention map for chosen keys: exp(scale * q.k - lse), queries x chosen keys and no more."""

from __future__ import annotations

import torch

from attnctrl.kernels.groups_reference import precision


def column_probabilities(
    query: torch.Tensor,
    key_selected: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """The probabilities that the queries give to some keys: float32 (batch, heads, queries, selected).

    query: (batch, heads, queries, head_dim); key_selected: (batch, heads, selected, head_dim), rows of the key that
    `lse`, the natural log-sum-exp (batch, heads, queries), was computed with, at the same scale. visible: bool,
    broadcastable to the result, where a mask applied: `TokenGroups.visible(indices)`.

    Differentiable in query, key and lse. The gradient is that of the whole softmax, every key's part included, when
    lse comes from an attention that takes a gradient for it: `attention_with_lse` or `group_attention`.
    """
    exact = precision(query)
    scores = torch.matmul(query.to(exact), key_selected.to(exact).transpose(-1, -2)) * scale
    # Nothing visible at all: probabilities 0, and no gradient of exp(score + inf).
    sums = torch.where(lse == float("-inf"), float("inf"), lse)
    if visible is not None:
        # Before exp, not after: a hidden key's score may lie far above the sum of those that are seen.
        scores = scores.masked_fill(~visible, float("-inf"))
    return (scores - sums[..., None]).exp()
