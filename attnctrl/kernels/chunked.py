"""Attention with its log-sum-exp in plain PyTorch, a chunk of queries at a time: no array is queries x keys.

The form for devices without Triton. PyTorch's own fused attention gives no log-sum-exp that can be differentiated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from attnctrl.kernels.groups import TokenGroups
from attnctrl.kernels.groups_reference import check, precision

QUERY_CHUNK = 64
"""Queries at a time: as many scores per key as a head has channels, so that the scores cost what key and value do."""

Mask = TokenGroups | torch.Tensor | None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Mask,
    scale: float,
    chunk: int = QUERY_CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (batch, heads, queries, head_dim of value) and the log-sum-exp, float32 (batch, heads, queries).

    mask: token groups, or bool or additive and broadcastable to (batch, heads, queries, keys), or None; it gets no
    gradient. Both results have exact first gradients; the scores are computed again for them. A query that sees
    nothing has output 0 and log-sum-exp -inf. Memory per head: keys x (chunk + head_dim) and queries x head_dim.
    """
    check(query, key, value, mask if isinstance(mask, TokenGroups) else None, scale)
    if isinstance(mask, torch.Tensor) and mask.requires_grad:
        raise ValueError("The mask requires a gradient, which this attention does not give: detach it.")
    output, lse = _Chunked.apply(query, key, value, mask, scale, chunk)
    return output, lse


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Mask,
        scale: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        exact = precision(query)
        # Contiguous, or every chunk's product would copy them anew.
        keys, values = key.to(exact).transpose(-1, -2).contiguous(), value.to(exact).contiguous()
        output = query.new_empty(*query.shape[:3], value.shape[3])
        lse = torch.empty(query.shape[:3], dtype=exact, device=query.device)
        for rows in _chunks(query.shape[2], chunk):
            scores = _scores(query[:, :, rows].to(exact), keys, mask, rows, scale)
            top = scores.amax(dim=-1, keepdim=True)
            top.masked_fill_(top == float("-inf"), 0.0)
            weights = scores.sub_(top).exp_()
            total = weights.sum(dim=-1, keepdim=True)
            blind = total == 0
            output[:, :, rows] = (weights @ values / total.masked_fill(blind, 1.0)).to(query.dtype)
            lse[:, :, rows] = (total.log() + top).squeeze(-1)  # log 0 is -inf, as it should be
        ctx.save_for_backward(query, key, value, output, lse)
        # Not saved as tensors: a mask made under inference mode could not be, and it gets no gradient.
        ctx.mask, ctx.scale, ctx.chunk = mask, scale, chunk
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        exact = precision(query)
        keys, values = key.to(exact).contiguous(), value.to(exact).contiguous()
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(keys), torch.zeros_like(values)
        for rows in _chunks(query.shape[2], ctx.chunk):
            queries, grads = query[:, :, rows].to(exact), grad_output[:, :, rows].to(exact)
            # With P the probabilities: dS = P (dP - rowsum(dO O) + dLSE). A row that sees nothing has P = exp(-inf).
            offset = grad_lse[:, :, rows] - (grads * output[:, :, rows].to(exact)).sum(dim=-1)
            sums = lse[:, :, rows]
            sums = sums.masked_fill(sums == float("-inf"), float("inf"))
            probs = _scores(queries, keys.transpose(-1, -2), ctx.mask, rows, ctx.scale).sub_(sums[..., None]).exp_()
            grad_value += probs.transpose(-1, -2) @ grads
            grad_scores = probs.mul_((grads @ values.transpose(-1, -2)).add_(offset[..., None])).mul_(ctx.scale)
            grad_query[:, :, rows] = (grad_scores @ keys).to(query.dtype)
            grad_key += grad_scores.transpose(-1, -2) @ queries
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _chunks(queries: int, chunk: int) -> Iterator[slice]:
    for start in range(0, queries, chunk):
        yield slice(start, min(start + chunk, queries))


def _scores(queries: torch.Tensor, keys: torch.Tensor, mask: Mask, rows: slice, scale: float) -> torch.Tensor:
    """Scaled and masked scores of some rows, (batch, heads, rows, keys); keys: (batch, heads, head_dim, keys)."""
    scores = (queries @ keys).mul_(scale)
    if mask is None:
        return scores
    if isinstance(mask, TokenGroups):
        seen = (mask.query_bits[:, rows, None] & mask.key_bits[:, None, :]) != 0
        return scores.masked_fill_(~seen[:, None], float("-inf"))
    part = mask[..., rows, :] if mask.shape[-2] > 1 else mask
    if part.dtype == torch.bool:
        return scores.masked_fill_(~part, float("-inf"))
    return scores.add_(part)
