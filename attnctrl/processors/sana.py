"""SANA: cross-attention under control; its self-attention is linear, has no map, and stays the stock one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0

from attnctrl.processors.classic import ClassicProcessor, Layer
from attnctrl.processors.family import Family, uncompiled
from attnctrl.processors.masked import cleaned, masked_outputs, patch_grid, pictures_of
from attnctrl.prompt import Reader
from attnctrl.sites import Grid, Site
from attnctrl.text import Text


class SanaLayer(Layer):
    """An `Attention` module that normalises queries and keys across all heads (SANA 1.5)."""

    def normed(self, norm: Any, states: torch.Tensor) -> torch.Tensor:
        return self.heads(states if norm is None else norm(states))


class SanaProcessor(ClassicProcessor):
    """SanaAttnProcessor2_0 under control."""

    layer = SanaLayer


class SanaFamily(Family):
    """How the run reads a SANA pipeline."""

    describes = "SANA pipelines (SanaTransformer2DModel)"
    processor = SanaProcessor
    plain = (SanaAttnProcessor2_0,)

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe.transformer)

    @staticmethod
    def fits(pipe: Any) -> bool:
        """Not SANA-Sprint, whose pipeline rotates the latents on their way to the denoiser."""
        model = uncompiled(getattr(pipe, "transformer", None))
        return isinstance(model, SanaTransformer2DModel) and not model.config.guidance_embeds

    def sites(self) -> list[tuple[Site, Any]]:
        return [
            (Site(f"transformer_blocks.{i}.attn2", "cross", "", i), block.attn2)
            for i, block in enumerate(self.model.transformer_blocks)
        ]

    def timestep(self, value: Any) -> float:
        return super().timestep(value) / float(self.model.config.timestep_scale)

    def latent_grid(self, args: tuple, kwargs: dict[str, Any]) -> Grid:
        return patch_grid(self.signature.get(args, kwargs, "hidden_states"), self.model.config.patch_size)

    def prediction(self, output: torch.Tensor, grid: Grid) -> torch.Tensor:
        return pictures_of(output, self.model.config).float()

    def text(self, outputs: tuple) -> Text:
        """The result of `encode_prompt`: (positive, its mask, negative, its mask)."""
        return Text(outputs[0], outputs[2])

    def outputs(self, text: Text, like: tuple) -> tuple:
        return masked_outputs(text, like)

    def readers(self, pipe: Any, arguments: dict[str, Any]) -> list[Reader]:
        """Gemma reads instructions before the prompt; of their tokens only the first and the last one are kept."""
        clean = partial(cleaned, pipe, bool(arguments.get("clean_caption")))
        limit, instructions = arguments.get("max_sequence_length"), arguments.get("complex_human_instruction")
        if not instructions:
            return [Reader(pipe.tokenizer, limit=limit, clean=clean)]
        # The pipeline cleans instructions and prompt apart, so the prompt is cleaned alone here too.
        before = "\n".join(instructions)
        drop = len(pipe.tokenizer.encode(before)) - 2
        return [Reader(pipe.tokenizer, limit=limit, template=before + "{}", drop=drop, clean=clean)]
