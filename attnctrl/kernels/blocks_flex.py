"""Sparse blocks and PyTorch's FlexAttention: its BlockMask from ours and ours from its, and the attention by it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from attnctrl.kernels.blocks import SparseBlocks
from attnctrl.kernels.blocks_axis import BlockAxis
from attnctrl.kernels.blocks_lists import block_maps, ordered
from attnctrl.kernels.blocks_reference import check
from attnctrl.kernels.blocks_rule import blocks_from_rule
from attnctrl.kernels.groups_flex import AuxRequest


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: SparseBlocks,
    scale: float,
    with_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `blocks_reference.block_attention` computes. The log-sum-exp is differentiable.

    Compiled on a GPU. Elsewhere PyTorch evaluates it eagerly, which allocates queries x keys, and refuses inputs that
    require a gradient: for tests only. Tokens in segments are first laid out block by block, which copies them.
    """
    check(query, key, value, mask, scale)
    axes = (mask.query_axis, mask.key_axis, mask.key_axis)
    padded = [
        t if axis.uniform else axis.cut(t).flatten(2, 3) for t, axis in zip((query, key, value), axes, strict=True)
    ]
    flex = _kept(mask)
    attend = _compiled() if query.device.type == "cuda" else flex_attention
    lse = None
    if not with_lse:
        output = attend(*padded, block_mask=flex, scale=scale)
    elif AuxRequest is None:
        output, lse = attend(*padded, block_mask=flex, scale=scale, return_lse=True)
    else:
        output, more = attend(*padded, block_mask=flex, scale=scale, return_aux=AuxRequest(lse=True))
        lse = more.lse
    if not mask.query_axis.uniform:
        output = mask.query_axis.join(output.unflatten(2, (-1, mask.query_axis.size)))
        lse = None if lse is None else mask.query_axis.join(lse.unflatten(2, (-1, mask.query_axis.size))[..., None])
        lse = None if lse is None else lse[..., 0]
    return output, lse


def to_flex(mask: SparseBlocks) -> BlockMask:
    """The mask as FlexAttention's, with its full and partial blocks; no token is looked at to make it.

    Raises:
        ValueError: a segment before the last does not fill its blocks; FlexAttention knows no such blocks.
    """
    for name, axis in (("queries", mask.query_axis), ("keys", mask.key_axis)):
        if not axis.uniform:
            raise ValueError(
                f"The {name} have segments of {axis.segments} tokens in blocks of {axis.size}, which FlexAttention "
                "cannot address: lay them out block by block (BlockAxis.cut) first."
            )
    return _flex(mask, *(BlockAxis((axis.tokens,), axis.size) for axis in (mask.query_axis, mask.key_axis)))


def from_flex(flex: BlockMask) -> SparseBlocks:
    """FlexAttention's mask as ours. Its rule is asked about the tokens of partial blocks, once; waits for a GPU.

    Raises:
        ValueError: its blocks are of a size that ours do not have.
    """
    axes = [BlockAxis((int(n),), int(size)) for n, size in zip(flex.seq_lengths, flex.BLOCK_SIZE, strict=True)]
    partial = _map(flex.kv_num_blocks, flex.kv_indices)
    mask = blocks_from_rule(flex.mask_mod, axes[0], axes[1], candidates=partial)
    if flex.full_kv_num_blocks is None or flex.full_kv_indices is None:
        return mask
    full = _map(flex.full_kv_num_blocks, flex.full_kv_indices)
    pattern = None if mask.pattern is None else mask.pattern.masked_fill(full, 0)
    return SparseBlocks(mask.visited | full, axes[0], axes[1], pattern=pattern, patterns=mask.patterns)


def _map(count: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """bool (batch, heads, rows, blocks): the first `count` of each row of `order`."""
    listed = torch.arange(order.shape[-1], device=order.device) < count[..., None]
    return torch.zeros_like(listed).scatter_(-1, order.long(), listed)


def _kept(mask: SparseBlocks) -> BlockMask:
    """The mask for tokens that are laid out block by block wherever an axis is not uniform."""
    if "flex" not in mask.memo:
        sides = (mask.query_axis, mask.key_axis)
        laid = [axis.tokens if axis.uniform else axis.blocks * axis.size for axis in sides]
        mask.memo["flex"] = _flex(mask, *(BlockAxis((n,), axis.size) for n, axis in zip(laid, sides, strict=True)))
    found: BlockMask = mask.memo["flex"]
    return found


def _flex(mask: SparseBlocks, query_axis: BlockAxis, key_axis: BlockAxis) -> BlockMask:
    """The blocks of `mask` as FlexAttention's over axes with as many blocks."""
    visited, full = block_maps(mask, mask.key_axis)
    partial = visited & ~full
    token, exists = mask.key_axis.slots(mask.device)
    seen = exists[None] if mask.hidden is None else exists & ~mask.hidden[:, token]
    seen = seen.flatten(1)  # (batch or 1, slots of keys)
    # Shared by samples or heads: index 0, as arithmetic, because a mask_mod is traced for one b without its value.
    sample_step, batch_step, head_step = (int(n > 1) for n in (seen.shape[0], *visited.shape[:2]))
    pattern, patterns, (rows, columns) = mask.pattern, mask.patterns, (query_axis.size, key_axis.size)

    # Says everything, not only what the lists leave open: uncompiled, FlexAttention looks at nothing else.
    def sees(b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
        block = (b * batch_step, h * head_step, q // rows, k // columns)
        visible = visited[block] & seen[b * sample_step, k]
        if pattern is None or patterns is None:
            return visible
        return visible & patterns[pattern[block], q % rows, k % columns]

    return BlockMask.from_kv_blocks(
        partial.sum(dim=-1, dtype=torch.int32),
        ordered(partial, partial),
        full.sum(dim=-1, dtype=torch.int32),
        ordered(full, full),
        BLOCK_SIZE=(rows, columns),
        mask_mod=sees,
        seq_lengths=(query_axis.tokens, key_axis.tokens),
    )


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention)
