"""Stable Diffusion 3 and 3.5: joint attention over [latents, text], 3.5's dual blocks with a latent-only one beside."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0

from attnctrl.processors.family import Family, Names, uncompiled
from attnctrl.processors.joint import JointProcessor, before_text
from attnctrl.processors.work import Branch, Work
from attnctrl.prompt import Reader
from attnctrl.sites import Grid, Site, TokenLayout
from attnctrl.text import Text


class SD3Layer:
    """One call of an SD3 attention module: projections and norms before, output projections after.

    hidden_states: (batch, latent tokens, channels). context: (batch, text tokens, channels), None in `attn2`.
    ignored: a mask, which the stock processor takes and ignores.
    """

    mask: torch.Tensor | None = None

    def __init__(
        self, attn: Any, hidden_states: torch.Tensor, context: torch.Tensor | None, ignored: torch.Tensor | None
    ) -> None:
        self.attn, self.joint, self.latents = attn, context is not None, hidden_states.shape[1]
        makers = ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None))
        parts = [self._heads(hidden_states, *maker) for maker in makers]
        if context is not None:
            makers = (
                (attn.add_q_proj, attn.norm_added_q),
                (attn.add_k_proj, attn.norm_added_k),
                (attn.add_v_proj, None),
            )
            added = [self._heads(context, *maker) for maker in makers]
            parts = [torch.cat(pair, dim=2) for pair in zip(parts, added, strict=True)]
        self.query, self.key, self.value = parts
        self.scale = self.query.shape[-1] ** -0.5

    def _heads(self, states: torch.Tensor, project: Any, norm: Any) -> torch.Tensor:
        """(batch, tokens, channels) -> (batch, heads, tokens, head_dim)."""
        states = project(states).unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)
        return states if norm is None else norm(states)

    def finish(self, output: torch.Tensor) -> Any:
        """(batch, heads, tokens, head_dim) -> latents, and text where the layer is joint."""
        attn = self.attn
        states = output.transpose(1, 2).flatten(2).to(self.query.dtype)
        latents = attn.to_out[1](attn.to_out[0](states[:, : self.latents]))
        if not self.joint:
            return latents
        text = states[:, self.latents :]
        return latents, text if attn.context_pre_only else attn.to_add_out(text)


class SD3Processor(JointProcessor):
    """JointAttnProcessor2_0 under control."""

    layer = SD3Layer

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> Any:
        return self.answer(attn, hidden_states, encoder_hidden_states, attention_mask)

    def layouts(self, layer: SD3Layer, work: Work) -> tuple[TokenLayout, TokenLayout]:
        layout = before_text(work.text if layer.joint else 0, work.latents)
        return layout, layout


class SD3Family(Family):
    """How the run reads a Stable Diffusion 3 pipeline."""

    describes = "Stable Diffusion 3 and 3.5 pipelines (SD3Transformer2DModel)"
    processor = SD3Processor
    plain = (JointAttnProcessor2_0, FusedJointAttnProcessor2_0)
    names = Names(pooled="pooled_projections")

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe.transformer)

    @staticmethod
    def fits(pipe: Any) -> bool:
        return isinstance(uncompiled(getattr(pipe, "transformer", None)), SD3Transformer2DModel)

    def sites(self) -> list[tuple[Site, Any]]:
        found = []
        for i, block in enumerate(self.model.transformer_blocks):
            found.append((f"transformer_blocks.{i}.attn", "joint", block.attn))
            if block.attn2 is not None:
                found.append((f"transformer_blocks.{i}.attn2", "self", block.attn2))
        return [(Site(name, kind, "", order), module) for order, (name, kind, module) in enumerate(found)]

    def branches(self, rows: int, pictures: int, number: int) -> tuple[Branch, ...]:
        """Skip-layer guidance calls once more, on the conditional rows: a prediction that is to stay the plain one."""
        if number == 1 and rows == pictures:
            return (Branch("skip", slice(0, rows)),)
        return super().branches(rows, pictures, number)

    def latent_grid(self, args: tuple, kwargs: dict[str, Any]) -> Grid:
        height, width = self.signature.get(args, kwargs, "hidden_states").shape[-2:]
        patch = int(self.model.config.patch_size)
        return 1, height // patch, width // patch

    def latents(self, sample: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Inpainting models take more channels than they return, the rest being conditions."""
        return sample[:, : int(self.model.out_channels)]

    def text(self, outputs: tuple) -> Text:
        """The result of `encode_prompt`: (positive, negative, pooled, negative pooled)."""
        return Text(*outputs)

    def outputs(self, text: Text, like: tuple) -> tuple:
        return text.positive, text.negative, text.pooled, text.negative_pooled

    def readers(self, pipe: Any, arguments: dict[str, Any]) -> list[Reader]:
        """CLIP-L and CLIP-G side by side, token by token; after them T5, whose tokens are zeros where it is absent."""
        found = [Reader(pipe.tokenizer), Reader(pipe.tokenizer_2, "prompt_2")]
        if pipe.text_encoder_3 is not None:
            limit, offset = arguments.get("max_sequence_length"), pipe.tokenizer_max_length
            found.append(Reader(pipe.tokenizer_3, "prompt_3", limit=limit, offset=offset))
        return found
