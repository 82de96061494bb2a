"""Attention kernels; they know nothing of controls."""

from attnctrl.kernels.columns import column_probabilities, mean_columns
from attnctrl.kernels.dispatch import attention_with_lse, group_attention, masked_attention, one_call_does
from attnctrl.kernels.groups import TokenGroups
from attnctrl.kernels.low_rank import LowRankBias
from attnctrl.kernels.reference import attention, combine_masks, logits, probabilities

__all__ = [
    "attention",
    "combine_masks",
    "masked_attention",
    "logits",
    "probabilities",
    "LowRankBias",
    "TokenGroups",
    "group_attention",
    "attention_with_lse",
    "one_call_does",
    "column_probabilities",
    "mean_columns",
]
