"""Mochi: joint attention over [latents, text], the padding of the text taking no part."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import MochiPipeline, MochiTransformer3DModel
from diffusers.models.attention_processor import MochiAttnProcessor2_0

from attnctrl.processors.family import Family, keep_length, uncompiled
from attnctrl.processors.joint import JointProcessor, before_text
from attnctrl.processors.work import Work
from attnctrl.prompt import Reader
from attnctrl.sites import Grid, Site, TokenLayout
from attnctrl.text import Text


class MochiLayer:
    """One call of a MochiAttention module.

    The stock processor attends picture by picture without the padded text; here the padding stays in the sequence,
    hidden from every query. It must be on the right, as the pipeline's tokenizer puts it.
    """

    def __init__(
        self, attn: Any, hidden_states: torch.Tensor, context: torch.Tensor, visible: torch.Tensor, rotary: Any
    ) -> None:
        self.attn, self.text, self.visible = attn, context.shape[1], visible.bool()
        latents = visible.new_ones(len(visible), hidden_states.shape[1], dtype=torch.bool)
        self.mask = torch.cat([latents, self.visible], dim=1)[:, None, None]
        query, key, value = (self._heads(make(hidden_states)) for make in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        added = (self._heads(make(context)) for make in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        text_query, text_key, text_value = added
        text_query, text_key = attn.norm_added_q(text_query), attn.norm_added_k(text_key)
        if rotary is not None:
            query, key = rotated(query, *rotary), rotated(key, *rotary)
        pairs = ((query, text_query), (key, text_key), (value, text_value))
        self.query, self.key, self.value = (torch.cat(pair, dim=1).transpose(1, 2) for pair in pairs)
        self.scale = self.query.shape[-1] ** -0.5

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, channels) -> (batch, tokens, heads, head_dim)."""
        return states.unflatten(-1, (self.attn.heads, -1))

    def finish(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, heads, tokens, head_dim) -> (latents, text); padded text gets zeros before the projection."""
        states = output.transpose(1, 2).flatten(2).to(self.query.dtype)
        latents, text = states[:, : -self.text], states[:, -self.text :]
        text = text * self.visible[..., None]
        latents = self.attn.to_out[1](self.attn.to_out[0](latents))
        return latents, self.attn.to_add_out(text) if hasattr(self.attn, "to_add_out") else text


def rotated(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of neighbouring channels. states: (batch, tokens, heads, head_dim).

    cosine, sine: (tokens, heads, head_dim / 2), float32.
    """
    even, odd = states[..., 0::2].float(), states[..., 1::2].float()
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return turned.flatten(-2).to(states.dtype)


class MochiProcessor(JointProcessor):
    """MochiAttnProcessor2_0 under control."""

    layer = MochiLayer

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.answer(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    def layouts(self, layer: MochiLayer, work: Work) -> tuple[TokenLayout, TokenLayout]:
        layout = before_text(layer.text, work.latents)
        return layout, layout


class MochiFamily(Family):
    """How the run reads a Mochi pipeline."""

    describes = "MochiPipeline (MochiTransformer3DModel)"
    processor = MochiProcessor
    plain = (MochiAttnProcessor2_0,)

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe.transformer)

    @staticmethod
    def fits(pipe: Any) -> bool:
        return isinstance(pipe, MochiPipeline) and isinstance(uncompiled(pipe.transformer), MochiTransformer3DModel)

    def sites(self) -> list[tuple[Site, Any]]:
        blocks = enumerate(self.model.transformer_blocks)
        return [(Site(f"transformer_blocks.{i}.attn1", "joint", "", i), block.attn1) for i, block in blocks]

    def latent_grid(self, args: tuple, kwargs: dict[str, Any]) -> Grid:
        frames, height, width = self.signature.get(args, kwargs, "hidden_states").shape[2:]
        return frames, height // self.model.config.patch_size, width // self.model.config.patch_size

    def text(self, outputs: tuple) -> Text:
        """The result of `encode_prompt`: (positive, its mask of the padding, negative, its mask)."""
        return Text(outputs[0], outputs[2])

    def outputs(self, text: Text, like: tuple) -> tuple:
        keep_length(text, like[0], "Mochi takes its padding to be the last ones")
        return text.positive, like[1], text.negative, like[3]

    def readers(self, pipe: Any, arguments: dict[str, Any]) -> list[Reader]:
        return [Reader(pipe.tokenizer, limit=arguments["max_sequence_length"])]
