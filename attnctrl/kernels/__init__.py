"""Attention kernels; they know nothing of controls."""

from attnctrl.kernels.blocks import SparseBlocks
from attnctrl.kernels.blocks_axis import BlockAxis
from attnctrl.kernels.blocks_dispatch import block_attention, why_full
from attnctrl.kernels.blocks_order import TokenOrder
from attnctrl.kernels.blocks_rule import blocks_from_rule, restricted
from attnctrl.kernels.blocks_select import draft_map, mass_blocks, top_blocks
from attnctrl.kernels.columns import column_probabilities, mean_columns
from attnctrl.kernels.dispatch import attention_with_lse, group_attention, masked_attention, one_call_does
from attnctrl.kernels.groups import TokenGroups
from attnctrl.kernels.low_rank import LowRankBias
from attnctrl.kernels.padding import padded
from attnctrl.kernels.reference import attention, combine_masks, logits, probabilities

__all__ = [
    "attention",
    "combine_masks",
    "masked_attention",
    "logits",
    "probabilities",
    "padded",
    "LowRankBias",
    "TokenGroups",
    "group_attention",
    "attention_with_lse",
    "one_call_does",
    "BlockAxis",
    "SparseBlocks",
    "blocks_from_rule",
    "restricted",
    "block_attention",
    "why_full",
    "draft_map",
    "top_blocks",
    "mass_blocks",
    "TokenOrder",
    "column_probabilities",
    "mean_columns",
]
