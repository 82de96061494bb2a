"""diffusers' `Attention` module: what its stock processor does around the attention itself."""

from __future__ import annotations

from typing import overload

import torch
from diffusers.models.attention_processor import Attention

from attnctrl.kernels import attention, combine_masks


class Layer:
    """One call of an `Attention` module: the projections before, and the output projection after."""

    def __init__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        context: torch.Tensor | None,
        mask: torch.Tensor | None,
        temb: torch.Tensor | None,
    ) -> None:
        self.attn, self.residual = attn, hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        self.shape = hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        batch = hidden_states.shape[0]
        self.key_count = (hidden_states if context is None else context).shape[1]
        self.mask = prepared_mask(attn, mask, batch, self.key_count)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query = self._heads(attn.to_q(hidden_states))
        self.query = query if attn.norm_q is None else attn.norm_q(query)
        self.key, self.value = self.keys_values(hidden_states if context is None else context, own=context is None)
        self.scale = self.query.shape[-1] ** -0.5

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, channels) -> (batch, heads, tokens, head_dim)."""
        return states.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)

    def keys_values(self, context: torch.Tensor, own: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of any context (batch, tokens, channels) for this layer."""
        if not own and self.attn.norm_cross:
            context = self.attn.norm_encoder_hidden_states(context)
        key, value = self._heads(self.attn.to_k(context)), self._heads(self.attn.to_v(context))
        return (key if self.attn.norm_k is None else self.attn.norm_k(key)), value

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        """(batch, heads, queries, head_dim) -> the layer's output."""
        attn = self.attn
        states = output.transpose(1, 2).flatten(2).to(self.query.dtype)
        states = attn.to_out[1](attn.to_out[0](states))
        if len(self.shape) == 4:
            states = states.transpose(-1, -2).reshape(self.shape)
        if attn.residual_connection:
            states = states + self.residual
        return states / attn.rescale_output_factor


def prepared_mask(attn: Attention, mask: torch.Tensor | None, batch: int, key_count: int) -> torch.Tensor | None:
    """The model's own mask as (batch, heads, 1 or queries, keys)."""
    if mask is None:
        return None
    prepared = attn.prepare_attention_mask(mask, key_count, batch)
    return prepared.view(batch, attn.heads, -1, prepared.shape[-1])


def masked_layer(
    attn: Attention,
    hidden_states: torch.Tensor,
    context: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    temb: torch.Tensor | None,
    mask: torch.Tensor,
) -> torch.Tensor:
    """The traceable form: one mask for the last rows of the batch, which are the conditional ones."""
    layer = Layer(attn, hidden_states, context, attention_mask, temb)
    free = layer.query.shape[0] - mask.shape[0]
    own = layer.mask
    outputs = []
    if free:
        rows = slice(0, free)
        outputs.append(
            attention(layer.query[rows], layer.key[rows], layer.value[rows], rows_of(own, rows), layer.scale)
        )
    rows = slice(free, None)
    both = mask if own is None else combine_masks([own[rows], mask])
    outputs.append(attention(layer.query[rows], layer.key[rows], layer.value[rows], both, layer.scale))
    return layer.finish(torch.cat(outputs))


@overload
def rows_of(tensor: torch.Tensor, rows: slice) -> torch.Tensor: ...
@overload
def rows_of(tensor: None, rows: slice) -> None: ...
def rows_of(tensor: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]
