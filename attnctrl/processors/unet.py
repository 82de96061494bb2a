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
from attnctrl.processors.attend import attend, observe_only
from attnctrl.processors.classic import Layer, masked_layer, prepared_mask, rows_of
from attnctrl.processors.family import Family, Names, uncompiled
from attnctrl.processors.work import Branch, Work
from attnctrl.prompt import Reader
from attnctrl.sites import BLOCK_MASKS, MASKS, Call, Grid, Site, TokenLayout
from attnctrl.text import Text


class UNetProcessor:
    """Stands in for a stock processor and calls it whenever no control asks for this site.

    owner: the installation that put it there; it knows which run, if any, the calling thread is in.
    """

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
        if torch.compiler.is_compiling():
            mask = None
            if attnctrl_block_masks is not None:
                # A block compiled on its own shares its graph with its like: the site's name would be a constant of it.
                mask = attnctrl_block_masks.get(self.site.kind)
            elif attnctrl_masks is not None:
                mask = attnctrl_masks.get(self.site.name)
            if mask is None:
                return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
            return masked_layer(attn, hidden_states, encoder_hidden_states, attention_mask, temb, mask)
        work: Work | None = self.owner.work(self.site)
        if work is None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        if work.observed_only:
            output = self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
            rows = next(b.rows for b in work.branches if b.name == "cond")
            layer = Layer(
                attn, rows_of(hidden_states, rows), rows_of(encoder_hidden_states, rows), None, rows_of(temb, rows)
            )
            mask = prepared_mask(attn, attention_mask, hidden_states.shape[0], layer.key_count)
            observe_only(self._call(layer, work, Branch("cond", slice(None)), rows_of(mask, rows)), work)
            return output
        layer = Layer(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
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


class UNetFamily(Family):
    """How the run reads a UNet pipeline."""

    describes = "Stable Diffusion 1.x, 2.x and XL pipelines (UNet2DConditionModel)"
    processor = UNetProcessor
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
