"""The UNets of Stable Diffusion 1.x, 2.x and XL: separate self- and cross-attention, text as keys."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)

from attnctrl.compiled import compiled_in_place
from attnctrl.processors.classic import ClassicProcessor
from attnctrl.processors.family import Family, Names, uncompiled
from attnctrl.prompt import Reader
from attnctrl.sites import BLOCK_MASKS, MASKS, Grid, Site
from attnctrl.text import Text


class UNetFamily(Family):
    """How the run reads a UNet pipeline."""

    describes = "Stable Diffusion 1.x, 2.x and XL pipelines (UNet2DConditionModel)"
    processor = ClassicProcessor
    # These compute the same function of the layer's weights; others (IP-Adapter's, PAG's) do more than that.
    plain = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
    names = Names(latents="sample", extras="cross_attention_kwargs")

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe.unet)

    @staticmethod
    def fits(pipe: Any) -> bool:
        return isinstance(uncompiled(getattr(pipe, "unet", None)), UNet2DConditionModel)

    def sites(self) -> list[tuple[Site, Attention]]:
        """Every attention layer of the transformer blocks with its module, in the order of the forward pass."""
        levels = len(self.model.down_blocks)
        found = []
        for name, module in self.model.named_modules():
            if not isinstance(module, Attention) or ".transformer_blocks." not in name:
                continue
            head, *rest = name.split(".")
            block = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}[head]
            level = int(rest[0]) if block != "mid" else 0
            depth = {"down": level, "mid": levels - 1, "up": levels - 1 - level}[block]
            rank = {"down": 0, "mid": 1, "up": 2}[block]
            kind = "cross" if module.is_cross_attention else "self"
            found.append(((rank, level), Site(name, kind, block, 0, depth), module))
        found.sort(key=lambda item: item[0])
        return [(Site(s.name, s.kind, s.block, i, s.depth), m) for i, (_, s, m) in enumerate(found)]

    def latent_grid(self, args: tuple, kwargs: dict[str, Any]) -> Grid:
        _, _, height, width = self.signature.get(args, kwargs, "sample").shape
        return 1, int(height), int(width)

    def latents(self, sample: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Inpainting UNets take more channels than they return, the rest being conditions."""
        return sample[:, : int(self.model.config.out_channels)]

    def with_pooled(self, args: tuple, kwargs: dict[str, Any], pooled: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
        """SDXL's stands among its conditions."""
        conditions = self.signature.get(args, kwargs, "added_cond_kwargs")
        if not conditions or "text_embeds" not in conditions:
            return args, kwargs
        return self.signature.put(args, kwargs, "added_cond_kwargs", {**conditions, "text_embeds": pooled})

    def text(self, outputs: tuple) -> Text:
        """The result of `encode_prompt`: (positive, negative) or (positive, negative, pooled, negative pooled)."""
        return Text(*outputs)

    def outputs(self, text: Text, like: tuple) -> tuple:
        return (text.positive, text.negative, text.pooled, text.negative_pooled)[: len(like)]

    def readers(self, pipe: Any, arguments: dict[str, Any]) -> list[Reader]:
        second = getattr(pipe, "tokenizer_2", None)
        # The two encoders of SDXL stand side by side, token by token.
        return [Reader(pipe.tokenizer), *([] if second is None else [Reader(second, "prompt_2")])]

    def compiled_blocks(self) -> list[tuple[torch.nn.Module, Callable]]:
        """The transformer blocks that are compiled one by one, with what gives each its own masks by site kind."""
        sites = [site for site, _ in self.sites()]
        return [
            (module, partial(_with_block_masks, [site for site in sites if site.name.startswith(name + ".")]))
            for name, module in self.model.named_modules()
            if re.search(r"\.transformer_blocks\.\d+$", name) and compiled_in_place(module)
        ]


def _with_block_masks(sites: list[Site], call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    extra = kwargs.get("cross_attention_kwargs") or {}
    if MASKS in extra:
        extra = dict(extra)
        masks = extra.pop(MASKS)
        extra[BLOCK_MASKS] = {site.kind: masks[site.name] for site in sites if site.name in masks}
        kwargs = {**kwargs, "cross_attention_kwargs": extra}
    return call(*args, **kwargs)
