"""The plain PyTorch forms: fused where nothing more is asked, materialised where scores or probabilities are."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Fused attention: (batch, heads, queries, head_dim of value), which may differ from that of query and key.

    mask: bool or additive, broadcastable to the scores.
    """
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    channels = value.shape[-1]
    query, key, value = one_width(query, key, value)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return output if output.shape[-1] == channels else output[..., :channels]


def one_width(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three with one head_dim, filled up with zeros, which change no product; the same tensors where it is one.

    For backends that know no other: PyTorch's fused attention takes other widths by materialising the scores.
    """
    wide = max(query.shape[-1], value.shape[-1])
    query, key, value = (t if t.shape[-1] == wide else F.pad(t, (0, wide - t.shape[-1])) for t in (query, key, value))
    return query, key, value


def logits(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """The scaled and masked scores, materialised in float32: (batch, heads, queries, keys)."""
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scale
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask.float()


def probabilities(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """softmax of `logits` over the keys: float32 (batch, heads, queries, keys)."""
    return logits(query, key, mask, scale).softmax(dim=-1)


def combine_masks(masks: list[torch.Tensor]) -> torch.Tensor | None:
    """The mask that allows what all of `masks` allow; additive masks are summed.

    A query that two boolean masks together leave with nothing to see sees everything, instead of becoming NaN.
    """
    if not masks:
        return None
    booleans = [m for m in masks if m.dtype == torch.bool]
    floats = [m for m in masks if m.dtype != torch.bool]
    allowed = None
    for mask in booleans:
        allowed = mask if allowed is None else allowed & mask
    if allowed is not None and len(booleans) > 1:
        allowed = allowed | ~allowed.any(dim=-1, keepdim=True)
    if not floats:
        return allowed
    total = sum(floats[1:], floats[0])
    return total if allowed is None else total.masked_fill(~allowed, float("-inf"))
