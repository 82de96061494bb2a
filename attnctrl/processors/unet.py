"""The UNets of Stable Diffusion 1.x, 2.x and XL: separate self- and cross-attention, text as keys."""

from __future__ import annotations

import re
from dataclasses import replace
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
from diffusers.models.resnet import ResnetBlock2D

from attnctrl.processors.classic import ClassicProcessor
from attnctrl.processors.family import Family, Names, uncompiled
from attnctrl.processors.work import Branch, halves_of, thirds_of
from attnctrl.prompt import Reader
from attnctrl.sites import Grid, Site
from attnctrl.text import Text

RANKS = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
PLACELESS = ("attn2.to_k", "attn2.to_v", "time_emb_proj")
"""Layers whose outputs are not latents: they read text, or the time."""


def acting(layer: Any, adapter: str) -> bool:
    """Whether a layer under LoRA adds what the last factor of this adapter gives: not if merged, off, or DoRA."""
    if layer.merged or layer.disable_adapters or adapter not in layer.active_adapters:
        return False
    return adapter not in layer.lora_magnitude_vector


class UNetFamily(Family):
    """How the run reads a UNet pipeline.

    instructed: InstructPix2Pix, which is guided by a text and a picture, so that its batch has three branches.
    """

    describes = "Stable Diffusion 1.x, 2.x, XL and InstructPix2Pix pipelines (UNet2DConditionModel)"
    processor = ClassicProcessor
    # These compute the same function of the layer's weights; others (IP-Adapter's, PAG's) do more than that.
    plain = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
    names = Names(latents="sample", extras="cross_attention_kwargs")
    blocks = r"\.transformer_blocks\.\d+$"

    def __init__(self, pipe: Any) -> None:
        from diffusers import StableDiffusionInstructPix2PixPipeline

        super().__init__(pipe.unet)
        self.instructed = isinstance(pipe, StableDiffusionInstructPix2PixPipeline)
        if self.instructed:
            self.encoder = "_encode_prompt"
            # A compiled layer takes its mask to be that of the last rows, and here the conditional ones come first.
            self.names = replace(self.names, extras="")

    @staticmethod
    def fits(pipe: Any) -> bool:
        return isinstance(uncompiled(getattr(pipe, "unet", None)), UNet2DConditionModel)

    def sites(self) -> list[tuple[Site, Attention]]:
        """Every attention layer of the transformer blocks with its module, in the order of the forward pass."""
        found = []
        for name, module in self.model.named_modules():
            if isinstance(module, Attention) and ".transformer_blocks." in name:
                kind = "cross" if module.is_cross_attention else "self"
                found.append((self._position(name)[:2], self._site(name, kind), module))
        found.sort(key=lambda item: item[0])
        return [(replace(site, order=i), module) for i, (_, site, module) in enumerate(found)]

    def residuals(self) -> list[tuple[Site, torch.nn.Module]]:
        """A block's second convolution is the last thing before its input is added."""
        before = [self._position(site.name) for site, _ in self.sites()]
        found = []
        for name, module in self.model.named_modules():
            if isinstance(module, ResnetBlock2D) and ".resnets." in name:
                at = self._position(name)
                order = sum(one < at for one in before)
                found.append((at, replace(self._site(name, "residual"), order=order), module.conv2))
        found.sort(key=lambda item: item[0])
        return [(site, module) for _, site, module in found]

    def adapters(self) -> list[tuple[Site, torch.nn.Module]]:
        """The last factor of each LoRA of a layer that has a place in the forward pass: what it gives is added."""
        attention = [self._position(site.name) for site, _ in self.sites()]
        found = []
        for name, module in self.model.named_modules():
            layer, marked, adapter = name.partition(".lora_B.")
            if not marked or layer.split(".")[0] not in RANKS or not acting(self.model.get_submodule(layer), adapter):
                continue
            kind = "global adapter" if layer.endswith(PLACELESS) else "adapter"
            at = self._position(layer)
            site = replace(self._site(layer, kind), name=f"{layer}/{adapter}", order=sum(one < at for one in attention))
            found.append((at, site, module))
        found.sort(key=lambda item: item[0])
        return [(site, module) for _, site, module in found]

    def skips(self) -> list[tuple[Site, torch.nn.Module]]:
        return [(self._site(f"up_blocks.{i}", "skip"), block) for i, block in enumerate(self.model.up_blocks)]

    @staticmethod
    def _position(name: str) -> tuple[int, int, int]:
        """Where a layer stands in the forward pass: the part of the UNet, the level, the number of its block there.

        Residual block i of a level comes before its attention i.
        """
        rank = RANKS[name.split(".")[0]]
        level = 0 if rank == 1 else int(name.split(".")[1])
        found = re.search(r"\.(?:resnets|attentions)\.(\d+)", name)
        return rank, level, int(found[1]) if found else 0

    def _site(self, name: str, kind: str) -> Site:
        rank, level, _ = self._position(name)
        levels = len(self.model.down_blocks)
        return Site(name, kind, ("down", "mid", "up")[rank], 0, (level, levels - 1, levels - 1 - level)[rank])

    def latent_grid(self, args: tuple, kwargs: dict[str, Any]) -> Grid:
        _, _, height, width = self.signature.get(args, kwargs, "sample").shape
        return 1, int(height), int(width)

    def branches(self, rows: int, pictures: int, number: int) -> tuple[Branch, ...]:
        return thirds_of(rows, pictures) if self.instructed else halves_of(rows, pictures)

    def latents(self, sample: torch.Tensor, grid: Grid) -> torch.Tensor:
        """UNets for inpainting and instructions take more channels than they return, the rest being conditions."""
        return sample[:, : int(self.model.config.out_channels)]

    def with_pooled(self, args: tuple, kwargs: dict[str, Any], pooled: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
        """SDXL's stands among its conditions."""
        conditions = self.signature.get(args, kwargs, "added_cond_kwargs")
        if not conditions or "text_embeds" not in conditions:
            return args, kwargs
        return self.signature.put(args, kwargs, "added_cond_kwargs", {**conditions, "text_embeds": pooled})

    def parts(self, outputs: Any, guided: bool) -> tuple:
        """InstructPix2Pix's is one tensor: the text, and for guidance the negative text for the other two branches."""
        if not self.instructed:
            return outputs
        return outputs.chunk(3)[:2] if guided else (outputs,)

    def text(self, outputs: tuple) -> Text:
        """The result of `encode_prompt`: (positive, negative) or (positive, negative, pooled, negative pooled)."""
        return Text(*outputs)

    def outputs(self, text: Text, like: Any) -> Any:
        if self.instructed:
            return text.positive if text.negative is None else torch.cat([text.positive, text.negative, text.negative])
        return (text.positive, text.negative, text.pooled, text.negative_pooled)[: len(like)]

    def readers(self, pipe: Any, arguments: dict[str, Any]) -> list[Reader]:
        second = getattr(pipe, "tokenizer_2", None)
        # The two encoders of SDXL stand side by side, token by token.
        return [Reader(pipe.tokenizer), *([] if second is None else [Reader(second, "prompt_2")])]
