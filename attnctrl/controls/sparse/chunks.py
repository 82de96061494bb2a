"""Attention of every query to the chunks of keys that it chose, merged by log-sum-exp; and the choice itself.

Not a block mask: neighbouring queries may choose differently, so that the queries of each chunk are gathered.
"""

from __future__ import annotations

import torch

from attnctrl.kernels import attention_with_lse


def chunk_means(key: torch.Tensor, chunk: torch.Tensor, chunks: int) -> torch.Tensor:
    """The mean key of each chunk: float32 (batch, heads, chunks, head_dim). chunk: each key's, int64 (keys,)."""
    sums = key.new_zeros(*key.shape[:2], chunks, key.shape[3], dtype=torch.float32).index_add_(2, chunk, key.float())
    return sums / chunk.bincount(minlength=chunks)[:, None]


def top_chunks(gate: torch.Tensor, own: torch.Tensor, count: int, per_query: bool) -> torch.Tensor:
    """The chunks with the highest gate, their own among them: bool (batch, heads, queries, chunks), of gate's shape.

    own: bool (queries, chunks), each query's chunk. count: chunks of each query, or of a head's queries on average.
    """
    ranked = gate.masked_fill(own, float("inf"))
    flat = ranked if per_query else ranked.flatten(2)
    count = min(count, gate.shape[3]) * (1 if per_query else gate.shape[2])
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, flat.topk(count, sorted=False).indices, True)
    return chosen.view(gate.shape)


def near_chunks(gate: torch.Tensor, own: torch.Tensor, share: float, per_query: bool) -> torch.Tensor:
    """The chunks that hold a share of the similarity: bool, of gate's shape (batch, heads, queries, chunks).

    The gate is brought to [0, 1] over the chunks of a query, or of a head's queries together. A query's own chunk
    counts first; then the highest ones until the share is reached, and the one in which it is. A share of 1 takes all.
    """
    if share >= 1:
        return torch.ones_like(gate, dtype=torch.bool)
    flat, mine = (gate, own) if per_query else (gate.flatten(2), own.flatten())
    low, high = flat.amin(dim=-1, keepdim=True), flat.amax(dim=-1, keepdim=True)
    similar = (flat - low) / (high - low).clamp(min=1e-12)
    total = similar.sum(dim=-1, keepdim=True)
    rest = (share * total - (similar * mine).sum(dim=-1, keepdim=True)).clamp(min=0)
    order = similar.masked_fill(mine, -1.0).argsort(dim=-1, descending=True)  # their own last, and never taken here
    others = (similar * ~mine).gather(-1, order)
    taken = (others.cumsum(dim=-1) - others) < rest
    taken[..., 0] = True
    chosen = torch.zeros_like(taken).scatter_(-1, order, taken) | mine
    return chosen.view(gate.shape)


def chunk_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chosen: torch.Tensor,
    sizes: tuple[int, ...],
    scale: float,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale * query key^T over the chosen chunks) value: (batch, heads, queries, head_dim). Differentiable.

    chosen: bool (batch, heads, queries, chunks). sizes: keys of each chunk, which follow each other. hidden: bool
    (batch or 1, keys), keys that nobody sees. Reads how many queries chose each chunk, so that on a GPU it waits.
    """
    batch, heads, queries, channels = query.shape
    flat = query.reshape(batch * heads, queries, channels)
    output = value.new_zeros(batch * heads, queries, value.shape[-1], dtype=torch.float32)
    lse = output.new_full((batch * heads, queries), float("-inf"))
    wants = chosen.flatten(0, 1)
    start = 0
    for number, size in enumerate(sizes):
        keys = slice(start, start + size)
        start += size
        who = wants[:, :, number]
        counts = who.sum(dim=1)
        most = int(counts.max())
        if most == 0:
            continue
        # Those that chose this chunk, and as many others as make the rows equally long.
        index = who.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        real = torch.arange(most, device=query.device) < counts[:, None]
        gathered = flat.gather(1, index[..., None].expand(-1, -1, channels)).view(batch, heads, most, channels)
        seen = None if hidden is None else ~hidden[:, None, None, keys]
        part, own = attention_with_lse(gathered, key[:, :, keys], value[:, :, keys], seen, scale)
        own = own.flatten(0, 1).masked_fill(~real, float("-inf"))
        before = lse.gather(1, index)
        top = torch.maximum(before, own).detach()
        top = top.masked_fill(top == float("-inf"), 0.0)
        mine, others = (own - top).exp(), (before - top).exp()
        total = mine + others
        some = total > 0
        total = total.masked_fill(~some, 1.0)  # else log 0, which has no gradient
        after = (top + total.log()).masked_fill(~some, float("-inf"))
        wide = index[..., None].expand(-1, -1, output.shape[-1])
        mixed = output.gather(1, wide) * (others / total)[..., None]
        mixed = mixed + part.flatten(0, 1).float() * (mine / total)[..., None]
        output, lse = output.scatter(1, wide, mixed), lse.scatter(1, index, after)
    return output.view(batch, heads, queries, -1).to(query.dtype)
