"""Attention under token groups by PyTorch's FlexAttention: tiles as its BlockMask, bits as its mask_mod."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import flex_attention as library
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from attnctrl.kernels.groups import TokenGroups
from attnctrl.kernels.groups_reference import check
from attnctrl.kernels.tiles import tile_maps

AuxRequest: Any = getattr(library, "AuxRequest", None)
"""How newer torch is asked for the log-sum-exp; older has the flag `return_lse`."""
BLOCK = 128
"""FlexAttention's own block size."""


def group_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: TokenGroups,
    scale: float,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `groups_reference.group_attention` computes. The log-sum-exp is differentiable.

    Compiled on a GPU. Elsewhere PyTorch evaluates it eagerly, which allocates queries x keys, and refuses inputs that
    require a gradient: for tests only.
    """
    check(query, key, value, groups, scale)
    attend = _compiled() if query.device.type == "cuda" else flex_attention
    mask = block_mask(groups)
    if not return_lse:
        return attend(query, key, value, block_mask=mask, scale=scale), None
    if AuxRequest is None:
        return attend(query, key, value, block_mask=mask, scale=scale, return_lse=True)
    output, more = attend(query, key, value, block_mask=mask, scale=scale, return_aux=AuxRequest(lse=True))
    return output, more.lse


def block_mask(groups: TokenGroups) -> BlockMask:
    """The mask as FlexAttention's, made from tiles, not tokens; kept with the mask."""
    if "flex" not in groups.memo:
        visited, full = (tiles[:, None] for tiles in tile_maps(groups, BLOCK, BLOCK))
        query_bits, key_bits = groups.query_bits, groups.key_bits
        # Shared by the samples: index 0, as arithmetic, because a mask_mod is traced for one b without its value.
        query_step, key_step = (int(bits.shape[0] > 1) for bits in (query_bits, key_bits))

        def sees(b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
            return (query_bits[b * query_step, q] & key_bits[b * key_step, k]) != 0

        groups.memo["flex"] = BlockMask.from_kv_blocks(
            *_ordered(visited & ~full),
            *_ordered(full),
            BLOCK_SIZE=BLOCK,
            mask_mod=sees,
            seq_lengths=(groups.queries, groups.keys),
        )
    found: BlockMask = groups.memo["flex"]
    return found


def _ordered(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FlexAttention's form of a bool (batch, 1, rows, tiles): how many are chosen, and all tiles with those first."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32), order.int()


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention)
