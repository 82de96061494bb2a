"""Launches the Triton kernel of attention under sparse blocks for query and key in 8 bits."""

from __future__ import annotations

import torch

from attnctrl.kernels.blocks import SparseBlocks
from attnctrl.kernels.blocks_autograd import constants, int8_tile, mask_arguments, mask_strides
from attnctrl.kernels.blocks_int8 import Quantised
from attnctrl.kernels.blocks_lists import block_lists
from attnctrl.kernels.blocks_triton import block_forward_kernel
from attnctrl.kernels.groups_autograd import addressable, capability, on_device


def kernel(
    query: Quantised, key: Quantised, value: torch.Tensor, mask: SparseBlocks, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `blocks_int8.reference` computes, for values of any strides in fp16, bf16 or float32."""
    batch, heads, queries, head_dim = query.values.shape
    value = addressable(value)
    output = torch.empty(query.values.shape, dtype=value.dtype, device=value.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=value.device)
    lists, blocks = block_lists(mask), (mask.query_axis.size, mask.key_axis.size)
    tile = int8_tile(head_dim, value.dtype, capability(value.device), *blocks)
    with on_device(value.device):
        block_forward_kernel[(batch * heads * lists.rows * (blocks[0] // tile.queries),)](
            *(query.values, key.values, value, output, lse),
            *mask_arguments(mask, lists),
            *(query.scale, key.scale, mask.key_axis.blocks, heads, queries, mask.keys, scale),
            *mask_strides(mask, lists),
            *(*query.values.stride(), *key.values.stride(), *value.stride(), *output.stride()),
            **constants(head_dim, value.dtype, tile, *blocks),
        )
    return output, lse
