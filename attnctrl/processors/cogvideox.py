"""CogVideoX: joint attention over [text, latents] through one set of projections."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers import CogVideoXVideoToVideoPipeline as CogVideoXVideoPipeline
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb

from attnctrl.processors.classic import prepared_mask
from attnctrl.processors.family import Family, keep_length, uncompiled
from attnctrl.processors.joint import JointProcessor, after_text
from attnctrl.processors.work import Work
from attnctrl.prompt import Reader
from attnctrl.sites import Grid, Site, TokenLayout
from attnctrl.text import Text


class CogVideoXLayer:
    """One call of an `Attention` module of CogVideoX."""

    def __init__(
        self, attn: Any, hidden_states: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None, rotary: Any
    ) -> None:
        self.attn, self.text = attn, context.shape[1]
        states = torch.cat([context, hidden_states], dim=1)
        self.mask = prepared_mask(attn, mask, states.shape[0], states.shape[1])
        parts = attn.to_qkv(states).chunk(3, dim=-1) if attn.fused_projections else self._projected(states)
        query, key, self.value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        self.query, self.key = self._rotated(query, rotary), self._rotated(key, rotary)
        self.scale = query.shape[-1] ** -0.5

    def _projected(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.attn.to_q(states), self.attn.to_k(states), self.attn.to_v(states)

    def _rotated(self, states: torch.Tensor, rotary: Any) -> torch.Tensor:
        """The latent tokens turned; without rotary embedding the positions are in the hidden states."""
        if rotary is None:
            return states
        text, latents = states[:, :, : self.text], states[:, :, self.text :]
        return torch.cat([text, apply_rotary_emb(latents, rotary).to(text.dtype)], dim=2)

    def finish(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, heads, tokens, head_dim) -> (latents, text)."""
        states = output.transpose(1, 2).flatten(2).to(self.query.dtype)
        states = self.attn.to_out[1](self.attn.to_out[0](states))
        return states[:, self.text :], states[:, : self.text]


class CogVideoXProcessor(JointProcessor):
    """CogVideoXAttnProcessor2_0 under control."""

    layer = CogVideoXLayer

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.answer(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    def layouts(self, layer: CogVideoXLayer, work: Work) -> tuple[TokenLayout, TokenLayout]:
        layout = after_text(layer.text, work.latents)
        return layout, layout


class CogVideoXFamily(Family):
    """How the run reads a CogVideoX pipeline, whose latents are (batch, frames, channels, height, width)."""

    describes = "CogVideoX pipelines (CogVideoXTransformer3DModel)"
    processor = CogVideoXProcessor
    plain = (CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0)

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe.transformer)

    @staticmethod
    def fits(pipe: Any) -> bool:
        known = isinstance(pipe, (CogVideoXPipeline, CogVideoXImageToVideoPipeline, CogVideoXVideoPipeline))
        return known and isinstance(uncompiled(pipe.transformer), CogVideoXTransformer3DModel)

    def sites(self) -> list[tuple[Site, Any]]:
        blocks = enumerate(self.model.transformer_blocks)
        return [(Site(f"transformer_blocks.{i}.attn1", "joint", "", i), block.attn1) for i, block in blocks]

    def latent_grid(self, args: tuple, kwargs: dict[str, Any]) -> Grid:
        """CogVideoX 1.5 puts several frames into one token; the pipeline has filled them up."""
        _, frames, _, height, width = self.signature.get(args, kwargs, "hidden_states").shape
        config = self.model.config
        return frames // (config.patch_size_t or 1), height // config.patch_size, width // config.patch_size

    def latents(self, sample: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The latents of a given image are further channels."""
        return sample[:, :, : int(self.model.config.out_channels)]

    def unpacked(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        return latents.transpose(1, 2)

    def packed(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        return latents.transpose(1, 2)

    def text(self, outputs: tuple) -> Text:
        """The result of `encode_prompt`: (positive, negative)."""
        return Text(*outputs)

    def outputs(self, text: Text, like: tuple) -> tuple:
        config = self.model.config
        if config.use_learned_positional_embeddings or not config.use_rotary_positional_embeddings:
            keep_length(text, like[0], "this CogVideoX has a table of positions for text and latents together")
        return text.positive, text.negative

    def readers(self, pipe: Any, arguments: dict[str, Any]) -> list[Reader]:
        return [Reader(pipe.tokenizer, limit=arguments["max_sequence_length"])]
