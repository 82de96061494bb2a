"""HunyuanVideo: joint attention over [latents, text], the text padded, in double and single blocks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

from attnctrl.processors.family import Family, keep_length, uncompiled
from attnctrl.processors.joint import JointProcessor, before_text, blocks_of
from attnctrl.processors.work import Work
from attnctrl.prompt import Reader
from attnctrl.sites import Grid, Site, TokenLayout
from attnctrl.text import Text


class HunyuanLayer:
    """One call of an `Attention` module of HunyuanVideo; single blocks have one set of projections for both."""

    def __init__(
        self, attn: Any, hidden_states: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None, rotary: Any
    ) -> None:
        self.attn, self.mask = attn, mask
        self.text, latents = context.shape[1], hidden_states.shape[1]
        double = attn.add_q_proj is not None
        states = hidden_states if double else torch.cat([hidden_states, context], dim=1)
        query, key, value = (self._heads(make(states)) for make in (attn.to_q, attn.to_k, attn.to_v))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if double:
            added = (self._heads(make(context)) for make in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
            text_query, text_key, text_value = added
            text_query = text_query if attn.norm_added_q is None else attn.norm_added_q(text_query)
            text_key = text_key if attn.norm_added_k is None else attn.norm_added_k(text_key)
            query, key = torch.cat([query, text_query], dim=2), torch.cat([key, text_key], dim=2)
            value = torch.cat([value, text_value], dim=2)
        if rotary is not None:
            query, key = (
                torch.cat([apply_rotary_emb(t[:, :, :latents], rotary), t[:, :, latents:]], dim=2) for t in (query, key)
            )
        self.query, self.key, self.value = query, key, value
        self.scale = query.shape[-1] ** -0.5

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, channels) -> (batch, heads, tokens, head_dim)."""
        return states.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)

    def finish(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, heads, tokens, head_dim) -> (latents, text), projected in double blocks."""
        states = output.transpose(1, 2).flatten(2).to(self.query.dtype)
        latents, text = states[:, : -self.text], states[:, -self.text :]
        if getattr(self.attn, "to_out", None) is not None:
            latents = self.attn.to_out[1](self.attn.to_out[0](latents))
        if getattr(self.attn, "to_add_out", None) is not None:
            text = self.attn.to_add_out(text)
        return latents, text


class HunyuanProcessor(JointProcessor):
    """HunyuanVideoAttnProcessor2_0 under control."""

    layer = HunyuanLayer

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.answer(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    def layouts(self, layer: HunyuanLayer, work: Work) -> tuple[TokenLayout, TokenLayout]:
        layout = before_text(layer.text, work.latents)
        return layout, layout


class HunyuanFamily(Family):
    """How the run reads a HunyuanVideo pipeline; the text refiner before the blocks stays as it is."""

    describes = "HunyuanVideoPipeline (HunyuanVideoTransformer3DModel)"
    processor = HunyuanProcessor
    plain = (HunyuanVideoAttnProcessor2_0,)
    separate = True
    encodes = 2

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe.transformer)

    @staticmethod
    def fits(pipe: Any) -> bool:
        known = isinstance(pipe, HunyuanVideoPipeline)
        return known and isinstance(uncompiled(pipe.transformer), HunyuanVideoTransformer3DModel)

    def sites(self) -> list[tuple[Site, Any]]:
        found = blocks_of(self.model, "transformer_blocks", "single_transformer_blocks")
        return [(Site(name, "joint", "", order), module) for order, (name, module) in enumerate(found)]

    def latent_grid(self, args: tuple, kwargs: dict[str, Any]) -> Grid:
        frames, height, width = self.signature.get(args, kwargs, "hidden_states").shape[2:]
        config = self.model.config
        return frames // config.patch_size_t, height // config.patch_size, width // config.patch_size

    def text(self, outputs: tuple) -> Text:
        """The result of `encode_prompt`: (Llama embeddings, pooled CLIP embedding, mask of the padding)."""
        return Text(outputs[0], pooled=outputs[1])

    def outputs(self, text: Text, like: tuple) -> tuple:
        keep_length(text, like[0], "HunyuanVideo takes its padding to be the last ones")
        return text.positive, text.pooled, like[2]

    def readers(self, pipe: Any, arguments: dict[str, Any]) -> list[Reader]:
        """Only Llama's tokens take part in the attention, without those of the template before the prompt."""
        given, limit = arguments["prompt_template"], arguments["max_sequence_length"]
        template, drop = given["template"], given.get("crop_start")
        if drop is None:
            # The pipeline finds it in the same way: all but the end-of-text token and the placeholder.
            drop = len(pipe.tokenizer(template, padding="max_length")["input_ids"]) - 2
        return [Reader(pipe.tokenizer, limit=limit, template=template, drop=drop)]
