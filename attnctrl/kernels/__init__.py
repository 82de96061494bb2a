"""Attention kernels; they know nothing of controls."""

from attnctrl.kernels.reference import attention, combine_masks, logits, probabilities

__all__ = ["attention", "combine_masks", "logits", "probabilities"]
