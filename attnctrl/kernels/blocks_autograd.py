"""Launches the Triton kernels of attention under sparse blocks, both directions, as one differentiable function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from attnctrl.kernels import groups_autograd
from attnctrl.kernels.blocks import SparseBlocks
from attnctrl.kernels.blocks_axis import BlockAxis
from attnctrl.kernels.blocks_lists import BlockLists, block_lists
from attnctrl.kernels.blocks_reference import check
from attnctrl.kernels.blocks_triton import block_forward_kernel
from attnctrl.kernels.blocks_triton_key import block_key_value_kernel
from attnctrl.kernels.blocks_triton_query import block_query_kernel
from attnctrl.kernels.groups import MAX_GROUPS, pack
from attnctrl.kernels.groups_autograd import addressable, capability, on_device
from attnctrl.kernels.launch import AMPERE, HOPPER, Tile, Tiles, kind, padded, tiles_for


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: SparseBlocks,
    scale: float,
    with_lse: bool = True,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `blocks_reference.block_attention` computes, in one kernel that walks the visited blocks.

    query, key and value are fp16, bf16 or float32 of any strides, head_dim up to 256. The log-sum-exp comes at no
    cost; both results have exact first gradients. tiles: others than the table's, whose sizes divide the blocks'.

    Raises:
        ValueError: arguments that do not fit together, or no CUDA device (and no interpreter).
    """
    check(query, key, value, mask, scale)
    if query.device.type != "cuda" and not groups_autograd.INTERPRETED:
        raise ValueError(
            f"The Triton form runs on a CUDA device, not on {query.device}; for its interpreter, set "
            "TRITON_INTERPRET=1 before triton is imported."
        )
    sizes = (mask.query_axis.size, mask.key_axis.size)
    tiles = tiles or block_tiles(query.shape[3], query.dtype, capability(query.device), *sizes)
    query, key, value = (addressable(tensor) for tensor in (query, key, value))
    output, lse = _Blocks.apply(query, key, value, mask, scale, tiles)
    return output, lse


AMPERE_KEY_VALUE = {64: Tile(32, 128, 8, 2), 128: Tile(32, 64, 8, 2)}
"""fp16 and bf16, by head_dim: with patterns the tiles of `launch` would spill there, by one or two registers."""


def block_tiles(head_dim: int, dtype: torch.dtype, capability: int, query_block: int, key_block: int) -> Tiles:
    """The tiles of `launch.tiles_for`, none larger than a block.

    One that loses rows to that gets four warps, and backward walks at most 32 tokens at a time: more would spill.
    """
    found = tiles_for(head_dim, dtype, capability)
    size = max(padded(head_dim), 64)
    if dtype != torch.float32 and kind(capability) == AMPERE and size in AMPERE_KEY_VALUE:
        found = replace(found, key_value=AMPERE_KEY_VALUE[size])
    if dtype != torch.float32 and kind(capability) == HOPPER and size == 128:
        # Triton 3.7 spills at the 128 keys of `launch`.
        found = replace(found, forward=Tile(128, 64, 8, 2))

    def fit(tile: Tile) -> Tile:
        return replace(tile, queries=min(tile.queries, query_block), keys=min(tile.keys, key_block))

    forward, query, key_value = fit(found.forward), fit(found.query), fit(found.key_value)
    if forward.queries < found.forward.queries:
        forward = replace(forward, warps=4)
    if query.queries < found.query.queries:
        query = replace(query, keys=min(query.keys, 32), warps=4)
    if key_value.keys < found.key_value.keys:
        key_value = replace(key_value, queries=min(key_value.queries, 32), warps=4)
    return Tiles(forward, query, key_value)


def int8_tile(head_dim: int, dtype: torch.dtype, capability: int, query_block: int, key_block: int) -> Tile:
    """The forward tile for query and key in 8 bits, whose scales take registers: at most 64 keys and 2 stages."""
    tile = block_tiles(head_dim, dtype, capability, query_block, key_block).forward
    return replace(tile, keys=min(tile.keys, 64), stages=min(tile.stages, 2))


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: SparseBlocks,
        scale: float,
        tiles: Tiles,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, queries, head_dim = query.shape
        output = torch.empty_like(query)
        lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
        lists, tile = block_lists(mask), tiles.forward
        programs = batch * heads * lists.rows * (mask.query_axis.size // tile.queries)
        with on_device(query.device):
            block_forward_kernel[(programs,)](
                *(query, key, value, output, lse),
                *mask_arguments(mask, lists),
                *(None, None, mask.key_axis.blocks, heads, queries, key.shape[2], scale),
                *mask_strides(mask, lists),
                *(*query.stride(), *key.stride(), *value.stride(), *output.stride()),
                **constants(head_dim, query.dtype, tile, mask.query_axis.size, mask.key_axis.size),
            )
        ctx.save_for_backward(query, key, value, output, lse)
        # Not saved as tensors: a mask made under inference mode could not be, and it gets no gradient.
        ctx.mask, ctx.scale, ctx.tiles = mask, scale, tiles
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        mask, scale, tiles = ctx.mask, ctx.scale, ctx.tiles
        batch, heads, queries, head_dim = query.shape
        blocks = (mask.query_axis.size, mask.key_axis.size)
        grad_output, grad_lse = addressable(grad_output.to(query.dtype)), grad_lse.contiguous()
        grad_query, offsets = torch.empty_like(output), torch.empty_like(lse)
        grad_key, grad_value = (torch.empty(key.shape, dtype=key.dtype, device=key.device) for _ in range(2))
        rows, columns = block_lists(mask), block_lists(mask, by_keys=True)
        sizes = (heads, queries, key.shape[2], scale)
        strides = (*query.stride(), *key.stride(), *value.stride())
        with on_device(query.device):
            block_query_kernel[(batch * heads * rows.rows * (blocks[0] // tiles.query.queries),)](
                *(query, key, value, output, grad_output, lse, grad_lse, grad_query, offsets),
                *mask_arguments(mask, rows),
                *sizes,
                *mask_strides(mask, rows),
                *(*strides, *output.stride(), *grad_output.stride()),
                **constants(head_dim, query.dtype, tiles.query, *blocks),
            )
            block_key_value_kernel[(batch * heads * columns.rows * (blocks[1] // tiles.key_value.keys),)](
                *(query, key, value, grad_output, lse, offsets, grad_key, grad_value),
                *mask_arguments(mask, columns, by_keys=True),
                *sizes,
                *mask_strides(mask, columns),
                *(*strides, *grad_output.stride()),
                **constants(head_dim, query.dtype, tiles.key_value, *blocks),
            )
        return grad_query, grad_key, grad_value, None, None, None


def mask_arguments(mask: SparseBlocks, lists: BlockLists, by_keys: bool = False) -> tuple[torch.Tensor | None, ...]:
    """The kernels' arguments from col_idx to key_length; None for what the mask does not have."""
    hidden = None if mask.hidden is None else mask.hidden.contiguous().view(torch.uint8)
    return (
        *(lists.col_idx, lists.full_start, lists.full_count, lists.partial_start, lists.partial_count),
        *(lists.pattern_idx, _words(mask, by_keys), hidden),
        *(*_bounds(mask.query_axis, mask.device), *_bounds(mask.key_axis, mask.device)),
    )


def mask_strides(mask: SparseBlocks, lists: BlockLists) -> tuple[int, int, int, int]:
    """The kernels' arguments rows, list_b, list_h and hidden_b."""
    hidden_b = mask.keys if mask.hidden is not None and mask.hidden.shape[0] > 1 else 0
    return lists.rows, *lists.strides, hidden_b


def constants(head_dim: int, dtype: torch.dtype, tile: Tile, query_block: int, key_block: int) -> dict[str, Any]:
    found = groups_autograd.constants(head_dim, dtype, tile)
    return {**found, "QUERY_BLOCK": query_block, "KEY_BLOCK": key_block}


def _words(mask: SparseBlocks, by_keys: bool) -> torch.Tensor | None:
    """The patterns as `blocks_triton.pattern_tile` reads them, int64 (patterns, own block size, words); kept."""
    name = ("words", by_keys)
    if mask.patterns is not None and name not in mask.memo:
        patterns = mask.patterns.transpose(1, 2) if by_keys else mask.patterns
        words = patterns.unflatten(2, (-1, min(MAX_GROUPS, patterns.shape[2])))
        mask.memo[name] = pack(words.flatten(0, 1)).view(words.shape[:3])
    return mask.memo.get(name)


def _bounds(axis: BlockAxis, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if axis.uniform else axis.bounds(device)
