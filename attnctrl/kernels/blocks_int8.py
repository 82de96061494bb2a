"""Attention under sparse blocks with query and key in 8 bits, after SageAttention (arXiv 2410.02367). Forward only.

The mean key is taken off every key: that moves all scores of a query alike, so that the probabilities stay, and what
is left needs fewer steps. Query and key are then rounded to 127 steps either side, each block by its own largest
number. Probabilities and value stay in the value's type.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from attnctrl.kernels.blocks import SparseBlocks
from attnctrl.kernels.blocks_axis import BlockAxis
from attnctrl.kernels.blocks_reference import check


class Quantised(NamedTuple):
    """values: int8 (batch, heads, tokens, head_dim). scale: float32 (batch, heads, blocks), what 1 stands for."""

    values: torch.Tensor
    scale: torch.Tensor

    def restored(self, axis: BlockAxis) -> torch.Tensor:
        """What the integers stand for, float32."""
        block = axis.block_of_token(self.values.device)[0]
        return self.values * self.scale[:, :, block, None]


def quantise(tensor: torch.Tensor, axis: BlockAxis) -> Quantised:
    """(batch, heads, tokens, head_dim) in 8 bits: each block by its largest absolute value / 127; halves to even."""
    blocks = axis.cut(tensor.float())
    scale = blocks.abs().amax(dim=(3, 4)) / 127
    steps = blocks / scale.masked_fill(scale == 0, 1.0)[..., None, None]
    return Quantised(axis.join(steps.round().to(torch.int8)).contiguous(), scale)


def without_mean(key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 keys less their mean over all tokens, and that mean, (batch, heads, 1, head_dim)."""
    mean = key.mean(dim=2, keepdim=True, dtype=torch.float32)
    return key.float() - mean, mean


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: SparseBlocks,
    scale: float,
    with_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`blocks_reference.block_attention` but for the rounding; on a CUDA device the kernel, elsewhere `reference`.

    The log-sum-exp is that of the scores with the mean key, so that it may be merged with that of other attentions.

    Raises:
        ValueError: arguments that do not fit together, or one that requires a gradient, which this does not give.
    """
    check(query, key, value, mask, scale)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        raise ValueError("Attention in 8 bits gives no gradients: use torch.no_grad(), or another form.")
    smooth, mean = without_mean(key)
    quantised = quantise(query, mask.query_axis), quantise(smooth, mask.key_axis)
    attend = reference
    if query.device.type == "cuda":
        from attnctrl.kernels.blocks_int8_triton import kernel as attend
    output, lse = attend(*quantised, value, mask, scale)
    return output, lse + scale * (query.float() @ mean.transpose(-1, -2)).squeeze(-1)


def reference(
    query: Quantised, key: Quantised, value: torch.Tensor, mask: SparseBlocks, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, in the value's type, and log-sum-exp of quantised query and key, materialised: the definition."""
    scores = query.restored(mask.query_axis) @ key.restored(mask.key_axis).transpose(-1, -2) * scale
    scores = scores.masked_fill(~mask.dense(), float("-inf"))
    lse = scores.logsumexp(dim=-1)
    top = scores.amax(dim=-1, keepdim=True)
    weights = (scores - top.masked_fill(top == float("-inf"), 0.0)).exp()
    total = weights.sum(dim=-1, keepdim=True)
    # Rounded before they are normalised, as the kernel does.
    output = weights.to(value.dtype).float() @ value.float() / total.masked_fill(total == 0, 1.0)
    return output.to(value.dtype), lse
