"""Launches the Triton kernels of attention under token groups, forward and backward, as one differentiable function."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from attnctrl.kernels.groups import TokenGroups
from attnctrl.kernels.groups_reference import check
from attnctrl.kernels.groups_triton import forward_kernel
from attnctrl.kernels.groups_triton_key import key_value_kernel
from attnctrl.kernels.groups_triton_query import query_kernel
from attnctrl.kernels.launch import HEAD_DIMS, Tile, Tiles, dot_precision, padded, tiles_for
from attnctrl.kernels.reference import one_width
from attnctrl.kernels.tiles import TileList, tile_list

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, on the CPU; it was decided when they were defined."""


def group_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: TokenGroups,
    scale: float,
    return_lse: bool = True,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `groups_reference.group_attention` computes, in one kernel that skips the tiles without a common group.

    query, key and value are fp16, bf16 or float32 of any strides; the kernels know one head_dim, so that where the
    value's is another the narrower are filled up with zeros. The log-sum-exp comes at no cost; both results have
    exact first gradients. tiles: others than the table's, whose sizes are powers of two, 16 or more.

    Raises:
        ValueError: arguments that do not fit together, or no CUDA device (and no interpreter).
    """
    check(query, key, value, groups, scale)
    if query.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"The Triton form runs on a CUDA device, not on {query.device}; for its interpreter, set "
            "TRITON_INTERPRET=1 before triton is imported."
        )
    channels = value.shape[3]
    query, key, value = one_width(query, key, value)
    tiles = tiles or tiles_for(query.shape[3], query.dtype, _capability(query.device))
    query, key, value = (_addressable(tensor) for tensor in (query, key, value))
    output, lse = _Groups.apply(query, key, value, groups, scale, tiles)
    return output[..., :channels], lse


class _Groups(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        groups: TokenGroups,
        scale: float,
        tiles: Tiles,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, queries, head_dim = query.shape
        output = torch.empty_like(query)
        lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
        tile = tiles.forward
        visits = tile_list(groups, tile.queries, tile.keys)
        with _on(query.device):
            forward_kernel[(batch * heads * visits.rows,)](
                *(query, key, value, output, lse),
                *_mask_arguments(groups, visits),
                *(heads, queries, key.shape[2], scale),
                *_mask_strides(groups, visits),
                *(*query.stride(), *key.stride(), *value.stride(), *output.stride()),
                **constants(head_dim, query.dtype, tile),
            )
        ctx.save_for_backward(query, key, value, output, lse)
        # Not saved as tensors: bits made under inference mode could not be, and they get no gradient.
        ctx.groups, ctx.scale, ctx.tiles = groups, scale, tiles
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        groups, scale, tiles = ctx.groups, ctx.scale, ctx.tiles
        batch, heads, queries, head_dim = query.shape
        grad_output, grad_lse = _addressable(grad_output.to(query.dtype)), grad_lse.contiguous()
        grad_query, offsets = torch.empty_like(output), torch.empty_like(lse)
        grad_key, grad_value = (torch.empty(key.shape, dtype=key.dtype, device=key.device) for _ in range(2))
        rows = tile_list(groups, tiles.query.queries, tiles.query.keys)
        columns = tile_list(groups, tiles.key_value.queries, tiles.key_value.keys, by_keys=True)
        sizes = (heads, queries, key.shape[2], scale)
        strides = (*query.stride(), *key.stride(), *value.stride())
        with _on(query.device):
            query_kernel[(batch * heads * rows.rows,)](
                *(query, key, value, output, grad_output, lse, grad_lse, grad_query, offsets),
                *_mask_arguments(groups, rows),
                *sizes,
                *_mask_strides(groups, rows),
                *(*strides, *output.stride(), *grad_output.stride()),
                **constants(head_dim, query.dtype, tiles.query),
            )
            key_value_kernel[(batch * heads * columns.rows,)](
                *(query, key, value, grad_output, lse, offsets, grad_key, grad_value),
                *_mask_arguments(groups, columns),
                *sizes,
                *_mask_strides(groups, columns),
                *(*strides, *grad_output.stride()),
                **constants(head_dim, query.dtype, tiles.key_value),
            )
        return grad_query, grad_key, grad_value, None, None, None


def _mask_arguments(groups: TokenGroups, visits: TileList) -> tuple[torch.Tensor, ...]:
    return (
        *(groups.query_bits.contiguous(), groups.key_bits.contiguous(), visits.col_idx),
        *(visits.full_start, visits.full_count, visits.partial_start, visits.partial_count),
    )


def _mask_strides(groups: TokenGroups, visits: TileList) -> tuple[int, int, int]:
    sides = (groups.query_bits, groups.key_bits)
    query_bits_b, key_bits_b = (bits.shape[1] if bits.shape[0] > 1 else 0 for bits in sides)
    return visits.batch_stride, query_bits_b, key_bits_b


def constants(head_dim: int, dtype: torch.dtype, tile: Tile) -> dict[str, Any]:
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded(head_dim),
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "PRECISION": dot_precision(dtype, INTERPRETED),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> int:
    """Compute capability, 90 for 9.0; in the interpreter any will do."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor


def _addressable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied only where one tile of it would span 2^31 elements: the kernels address in 32 bits there."""
    span = HEAD_DIMS[-1] * (tensor.stride(2) + tensor.stride(3))
    return tensor if span < 2**31 else tensor.contiguous()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
