"""diffusers' `Attention` module: what its stock processor does around the attention itself."""

from __future__ import annotations

from typing import Any, ClassVar, overload

import torch
from diffusers.models.attention_processor import Attention

from attnctrl.compiled import own_mask
from attnctrl.kernels import attention, combine_masks
from attnctrl.processors.attend import attend, observe_only
from attnctrl.processors.work import Branch, Work
from attnctrl.sites import Call, Site, TokenLayout


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
        self.query = self.normed(attn.norm_q, attn.to_q(hidden_states))
        self.key, self.value = self.keys_values(hidden_states if context is None else context, own=context is None)
        self.scale = self.query.shape[-1] ** -0.5

    def heads(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, channels) -> (batch, heads, tokens, head_dim)."""
        return states.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)

    def normed(self, norm: Any, states: torch.Tensor) -> torch.Tensor:
        """The same for queries and keys, normalised where the layer does so: here, within each head."""
        return self.heads(states) if norm is None else norm(self.heads(states))

    def keys_values(self, context: torch.Tensor, own: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of any context (batch, tokens, channels) for this layer."""
        if not own and self.attn.norm_cross:
            context = self.attn.norm_encoder_hidden_states(context)
        return self.normed(self.attn.norm_k, self.attn.to_k(context)), self.heads(self.attn.to_v(context))

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
    """The model's own mask as (batch, heads or 1, 1 or queries, keys)."""
    if mask is None:
        return None
    # A mask for each picture is repeated for every head, and stays one for all of them here.
    shared = mask.shape[0] < batch * attn.heads
    prepared = attn.prepare_attention_mask(mask, key_count, batch)
    prepared = prepared.view(batch, attn.heads, -1, prepared.shape[-1])
    return prepared[:, :1] if shared else prepared


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


class ClassicProcessor:
    """Stands in for a stock processor and calls it whenever no control asks for this site.

    owner: the installation that put it there; it knows which run, if any, the calling thread is in.
    """

    layer: ClassVar[type[Layer]] = Layer

    def __init__(self, stock: Any, site: Site, owner: Any) -> None:
        self.stock = stock
        self.site = site
        self.owner = owner

    # The signature is the stock one plus our keywords: Attention.forward drops what it does not find named here.
    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        attnctrl_masks: dict[str, torch.Tensor] | None = None,
        attnctrl_block_masks: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        # Some stock processors take no temb, so that it goes to them only where there is one.
        more = () if temb is None else (temb, *args)
        given = (attn, hidden_states, encoder_hidden_states, attention_mask, *more)
        if torch.compiler.is_compiling():
            mask = own_mask(self.site, attnctrl_masks, attnctrl_block_masks)
            if mask is None:
                return self.stock(*given, **kwargs)
            return masked_layer(attn, hidden_states, encoder_hidden_states, attention_mask, temb, mask)
        work: Work | None = self.owner.work(self.site)
        if work is None:
            return self.stock(*given, **kwargs)
        if work.observed_only:
            output = self.stock(*given, **kwargs)
            rows = next(b.rows for b in work.branches if b.name == "cond")
            layer = self.layer(
                attn, rows_of(hidden_states, rows), rows_of(encoder_hidden_states, rows), None, rows_of(temb, rows)
            )
            mask = prepared_mask(attn, attention_mask, hidden_states.shape[0], layer.key_count)
            observe_only(self._call(layer, work, Branch("cond", slice(None)), rows_of(mask, rows)), work)
            return output
        layer = self.layer(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        outputs = [
            attend(self._call(layer, work, branch, rows_of(layer.mask, branch.rows)), work) for branch in work.branches
        ]
        return layer.finish(outputs[0] if len(outputs) == 1 else torch.cat(outputs))

    def _call(self, layer: Layer, work: Work, branch: Branch, mask: torch.Tensor | None) -> Call:
        rows = branch.rows
        queries = TokenLayout.of_latents(self.site.grid(work.latents))
        if queries.latent.stop != layer.query.shape[2]:
            raise RuntimeError(
                f"site {self.site.name} has {layer.query.shape[2]} tokens where latents of grid {work.latents} give "
                f"{queries.latent.stop}: please report this model."
            )
        keys = queries if self.site.kind == "self" else TokenLayout.of_text(layer.key.shape[2])
        return Call(
            site=self.site,
            step=work.step,
            branch=branch.name,
            query=layer.query[rows],
            key=layer.key[rows],
            value=layer.value[rows],
            scale=layer.scale,
            queries=queries,
            keys=keys,
            mask=mask,
            project=layer.keys_values if self.site.kind == "cross" else None,
        )
