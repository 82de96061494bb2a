"""PixArt-alpha and PixArt-Sigma: the UNets' transformer block on a flat grid, T5 tokens as masked text keys."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0

from attnctrl.processors.classic import ClassicProcessor
from attnctrl.processors.family import Family, uncompiled
from attnctrl.processors.masked import cleaned, masked_outputs, patch_grid, pictures_of
from attnctrl.prompt import Reader
from attnctrl.sites import Grid, Site
from attnctrl.text import Text


class PixArtFamily(Family):
    """How the run reads a PixArt pipeline."""

    describes = "PixArt-alpha and PixArt-Sigma pipelines (PixArtTransformer2DModel)"
    processor = ClassicProcessor
    plain = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0)

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe.transformer)

    @staticmethod
    def fits(pipe: Any) -> bool:
        return isinstance(uncompiled(getattr(pipe, "transformer", None)), PixArtTransformer2DModel)

    def sites(self) -> list[tuple[Site, Any]]:
        found = [
            (f"transformer_blocks.{i}.{name}", kind, getattr(block, name))
            for i, block in enumerate(self.model.transformer_blocks)
            for name, kind in (("attn1", "self"), ("attn2", "cross"))
        ]
        return [(Site(name, kind, "", order), module) for order, (name, kind, module) in enumerate(found)]

    def latent_grid(self, args: tuple, kwargs: dict[str, Any]) -> Grid:
        return patch_grid(self.signature.get(args, kwargs, "hidden_states"), self.model.config.patch_size)

    def prediction(self, output: torch.Tensor, grid: Grid) -> torch.Tensor:
        return pictures_of(output, self.model.config)

    def text(self, outputs: tuple) -> Text:
        """The result of `encode_prompt`: (positive, its mask, negative, its mask)."""
        return Text(outputs[0], outputs[2])

    def outputs(self, text: Text, like: tuple) -> tuple:
        return masked_outputs(text, like)

    def readers(self, pipe: Any, arguments: dict[str, Any]) -> list[Reader]:
        clean = partial(cleaned, pipe, bool(arguments.get("clean_caption")))
        return [Reader(pipe.tokenizer, limit=arguments.get("max_sequence_length"), clean=clean)]
