"""LTX-Video: self-attention over packed video latents and cross-attention to padded text."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import LTXPipeline, LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor, apply_rotary_emb

from attnctrl.processors.classic import prepared_mask
from attnctrl.processors.family import Family, uncompiled
from attnctrl.processors.joint import JointProcessor
from attnctrl.processors.work import Work
from attnctrl.prompt import Reader
from attnctrl.sites import Grid, Site, TokenLayout
from attnctrl.text import Text


class LTXLayer:
    """One call of an LTXAttention module."""

    def __init__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        context: torch.Tensor | None,
        mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        self.attn = attn
        context = hidden_states if context is None else context
        self.mask = prepared_mask(attn, mask, context.shape[0], context.shape[1])
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(context))
        if rotary is not None:
            # Before the heads are split: the embedding runs over all channels.
            query, key = apply_rotary_emb(query, rotary), apply_rotary_emb(key, rotary)
        self.query, self.key, self.value = (
            states.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for states in (query, key, attn.to_v(context))
        )
        self.scale = self.query.shape[-1] ** -0.5

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        """(batch, heads, latent tokens, head_dim) -> the layer's output."""
        states = output.transpose(1, 2).flatten(2).to(self.query.dtype)
        return self.attn.to_out[1](self.attn.to_out[0](states))


class LTXProcessor(JointProcessor):
    """LTXVideoAttnProcessor under control."""

    layer = LTXLayer

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor:
        return self.answer(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    def layouts(self, layer: LTXLayer, work: Work) -> tuple[TokenLayout, TokenLayout]:
        queries = TokenLayout.of_latents(work.latents)
        return queries, queries if self.site.kind == "self" else TokenLayout.of_text(layer.key.shape[2])


class LTXFamily(Family):
    """How the run reads an LTX text-to-video pipeline.

    Its image-to-video pipelines step only a part of the latents, in another layout than the denoiser's, and are not
    read yet.
    """

    describes = "LTXPipeline (LTXVideoTransformer3DModel)"
    processor = LTXProcessor
    plain = (LTXVideoAttnProcessor,)

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe.transformer)

    @staticmethod
    def fits(pipe: Any) -> bool:
        return isinstance(pipe, LTXPipeline) and isinstance(uncompiled(pipe.transformer), LTXVideoTransformer3DModel)

    def sites(self) -> list[tuple[Site, Any]]:
        return [
            (Site(f"transformer_blocks.{i}.{attn}", kind, "", 2 * i + late), getattr(block, attn))
            for i, block in enumerate(self.model.transformer_blocks)
            for late, (attn, kind) in enumerate((("attn1", "self"), ("attn2", "cross")))
        ]

    def latent_grid(self, args: tuple, kwargs: dict[str, Any]) -> Grid:
        frames, height, width = (int(self.signature.get(args, kwargs, n)) for n in ("num_frames", "height", "width"))
        return frames, height, width

    def unpacked(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Every latent pixel is a token, at patch size 1, the only one that the model's positions allow."""
        return latents.unflatten(1, grid).movedim(-1, 1)

    def packed(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        return latents.movedim(1, -1).flatten(1, 3)

    def text(self, outputs: tuple) -> Text:
        """The result of `encode_prompt`: (positive, its mask of the padding, negative, its mask)."""
        return Text(outputs[0], outputs[2])

    def outputs(self, text: Text, like: tuple) -> tuple:
        """Further tokens are no padding."""
        more = text.positive.shape[1] - like[0].shape[1]
        masks = (mask if mask is None else F.pad(mask, (0, more), value=True) for mask in (like[1], like[3]))
        positive, negative = masks
        return text.positive, positive, text.negative, negative

    def readers(self, pipe: Any, arguments: dict[str, Any]) -> list[Reader]:
        return [Reader(pipe.tokenizer, limit=arguments["max_sequence_length"])]
