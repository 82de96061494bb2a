"""Attention under sparse blocks in plain PyTorch: each row of blocks gathers the keys that it visits.

The form for devices without Triton. Rows that visit about as many blocks are taken together, as many as keep the
gathered keys near a processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from attnctrl.kernels.blocks import SparseBlocks
from attnctrl.kernels.blocks_lists import block_lists
from attnctrl.kernels.blocks_reference import check
from attnctrl.kernels.groups_reference import precision

GATHERED = 2**19
"""Numbers of keys, and as many of values, that rows taken together may gather: two megabytes in float32."""


@dataclass(frozen=True)
class Rows:
    """Rows of blocks taken together. query: int64 (rows,), key: int64 (rows, visits), places in all planes' blocks.

    seen: bool (rows, 1 or query block size, visits * key block size); None where everything is.
    """

    query: torch.Tensor
    key: torch.Tensor
    seen: torch.Tensor | None


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: SparseBlocks,
    scale: float,
    with_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `blocks_reference.block_attention` computes, at a cost in proportion to the visited blocks.

    Reads how many blocks each row visits, so that on a GPU it waits for them. Both results have exact first gradients;
    the scores are computed again for them.
    """
    check(query, key, value, mask, scale)
    batch, heads = query.shape[:2]
    exact = precision(query)
    q = mask.query_axis.cut(query.to(exact)).flatten(0, 2)
    k, v = (mask.key_axis.cut(tensor.to(exact)).flatten(0, 2) for tensor in (key, value))
    if with_lse or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))):
        output, lse = _Gathered.apply(q, k, v, mask, scale, (batch, heads))
    else:
        output, lse = _fused(q, k, v, mask, scale, (batch, heads)), None
    output = mask.query_axis.join(output.unflatten(0, (batch, heads, -1))).to(query.dtype)
    if lse is None or not with_lse:
        return output, None
    return output, mask.query_axis.join(lse.unflatten(0, (batch, heads, -1))[..., None])[..., 0]


def gathered(mask: SparseBlocks, planes: tuple[int, int], head_dim: int) -> Iterator[Rows]:
    """All rows that visit something, those with fewer blocks first. planes: (batch, heads)."""
    batch, heads = planes
    lists = block_lists(mask)
    device, blocks, size = mask.device, mask.key_axis.blocks, mask.key_axis.size
    every = torch.arange(batch * heads, device=device)
    batch_stride, head_stride = lists.strides
    row = torch.arange(lists.rows, device=device)
    listed = ((every // heads) * batch_stride + (every % heads) * head_stride)[:, None] + row
    full, partial = (count.flatten()[listed.flatten()] for count in (lists.full_count, lists.partial_count))
    start = lists.full_start.flatten()[listed.flatten()]
    counts, order = (full + partial).sort(stable=True)
    sizes = counts.tolist()
    at = next((place for place, count in enumerate(sizes) if count > 0), len(sizes))
    while at < len(sizes):
        end = at + 1
        while end < len(sizes) and (end + 1 - at) * sizes[end] * size * head_dim <= GATHERED:
            end += 1
        rows, widest = order[at:end], sizes[end - 1]
        visit = torch.arange(widest, device=device)
        used = visit < counts[at:end, None]
        place = start[rows, None] + torch.where(used, visit, 0)
        column = lists.col_idx[place].long()
        plane = rows // lists.rows
        all_seen = sizes[at] == widest and not bool(partial[rows].any())
        seen = None if all_seen else _seen(mask, plane // heads, column, used, lists.pattern_idx, place)
        yield Rows(rows, plane[:, None] * blocks + column, seen)
        at = end


def _seen(
    mask: SparseBlocks,
    sample: torch.Tensor,
    column: torch.Tensor,
    used: torch.Tensor,
    pattern_idx: torch.Tensor | None,
    place: torch.Tensor,
) -> torch.Tensor:
    """What the queries of some rows see of the gathered keys: bool (rows, 1 or query block size, gathered keys)."""
    token, exists = mask.key_axis.slots(mask.device)
    seen = exists[column] & used[..., None]
    if mask.hidden is not None:
        own = sample if mask.hidden.shape[0] > 1 else torch.zeros_like(sample)
        seen = seen & ~mask.hidden[own[:, None, None], token[column]]
    if pattern_idx is None or mask.patterns is None:
        return seen.flatten(1)[:, None]
    inside = mask.patterns[pattern_idx[place].long()]  # (rows, visits, query block size, key block size)
    return (inside.transpose(1, 2) & seen[:, None]).flatten(2)


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseBlocks, scale: float, planes: tuple[int, int]
) -> torch.Tensor:
    """The output alone, by PyTorch's fused attention on the gathered keys: (planes * blocks, size, value width)."""
    output = q.new_zeros(*q.shape[:2], v.shape[-1])
    for rows in gathered(mask, planes, q.shape[-1]):
        keys, values = (_take(tensor, rows.key) for tensor in (k, v))
        seen = blind = None
        if rows.seen is not None:
            blind = ~rows.seen.any(dim=-1, keepdim=True)
            seen = (rows.seen | blind)[None]  # nothing to see would be 0 / 0 in some versions
        found = F.scaled_dot_product_attention(
            q[rows.query][None], keys[None], values[None], attn_mask=seen, scale=scale
        )[0]
        output[rows.query] = found if blind is None else found.masked_fill(blind, 0.0)
    return output


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: SparseBlocks,
        scale: float,
        planes: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output = q.new_zeros(*q.shape[:2], v.shape[-1])
        lse = q.new_full(q.shape[:2], float("-inf"))
        for rows in gathered(mask, planes, q.shape[-1]):
            scores = _scores(q[rows.query], _take(k, rows.key), rows.seen, scale)
            top = scores.amax(dim=-1, keepdim=True)
            top.masked_fill_(top == float("-inf"), 0.0)
            weights = scores.sub_(top).exp_()
            total = weights.sum(dim=-1, keepdim=True)
            output[rows.query] = weights @ _take(v, rows.key) / total.masked_fill(total == 0, 1.0)
            lse[rows.query] = (total.log() + top).squeeze(-1)  # log 0 is -inf, as it should be
        ctx.save_for_backward(q, k, v, output, lse)
        # Not saved as tensors: a mask made under inference mode could not be, and it gets no gradient.
        ctx.mask, ctx.scale, ctx.planes = mask, scale, planes
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.autocast(grad_output.device.type, enabled=False):  # its products would be of another type
            gradients = _gradients(ctx.saved_tensors, grad_output, grad_lse, ctx.mask, ctx.scale, ctx.planes)
        return *gradients, None, None, None


def _gradients(
    saved: tuple[torch.Tensor, ...],
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    mask: SparseBlocks,
    scale: float,
    planes: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of q, k and v. With P the probabilities: dS = P (dP - rowsum(dO O) + dLSE)."""
    q, k, v, output, lse = saved
    grad_q, grad_k, grad_v = (torch.zeros_like(tensor) for tensor in (q, k, v))
    offset = grad_lse - (grad_output * output).sum(dim=-1)
    sums = lse.masked_fill(lse == float("-inf"), float("inf"))  # a row that sees nothing has P = exp(-inf)
    for rows in gathered(mask, planes, q.shape[-1]):
        queries, grads = q[rows.query], grad_output[rows.query]
        keys, values = (_take(tensor, rows.key) for tensor in (k, v))
        probs = _scores(queries, keys, rows.seen, scale).sub_(sums[rows.query][..., None]).exp_()
        into_values = probs.transpose(-1, -2) @ grads
        grad_scores = (grads @ values.transpose(-1, -2)).add_(offset[rows.query][..., None])
        grad_scores.mul_(probs).mul_(scale)
        grad_q[rows.query] = grad_scores @ keys
        places = rows.key.flatten()
        for into, part in ((grad_v, into_values), (grad_k, grad_scores.transpose(-1, -2) @ queries)):
            into.index_add_(0, places, part.reshape(-1, *into.shape[1:]))
    return grad_q, grad_k, grad_v


def _take(blocks: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(rows, visits * size, head_dim): the blocks at some places, (rows, visits), laid end to end."""
    found = blocks.index_select(0, places.flatten())
    return found.view(places.shape[0], -1, blocks.shape[-1])


def _scores(queries: torch.Tensor, keys: torch.Tensor, seen: torch.Tensor | None, scale: float) -> torch.Tensor:
    scores = (queries @ keys.transpose(-1, -2)).mul_(scale)
    return scores if seen is None else scores.masked_fill_(~seen, float("-inf"))
