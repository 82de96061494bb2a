"""The UNets of Stable Diffusion 1.x, 2.x and XL: separate self- and cross-attention, text as keys."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property, partial
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
from attnctrl.processors.work import Branch, Work
from attnctrl.sites import Call, Grid, Site, Step, TokenLayout
from attnctrl.text import Text

# These compute the same function of the layer's weights; anything else (IP-Adapter's, PAG's) does more than that.
PLAIN = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
# The names under which the run hands things through `cross_attention_kwargs`.
MASKS, BLOCK_MASKS, SOURCE = "attnctrl_masks", "attnctrl_block_masks", "attnctrl_source"


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
        attnctrl_source: Any = None,
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
        work: Work | None = (attnctrl_source or self.owner).work(self.site)
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


class UNetFamily:
    """How the run reads a UNet pipeline."""

    describes = "Stable Diffusion 1.x, 2.x and XL pipelines (UNet2DConditionModel)"
    processor = UNetProcessor

    def __init__(self, pipe: Any) -> None:
        self.model: UNet2DConditionModel = _uncompiled(pipe.unet)
        self.outer: torch.nn.Module = pipe.unet

    @staticmethod
    def fits(pipe: Any) -> bool:
        return isinstance(_uncompiled(getattr(pipe, "unet", None)), UNet2DConditionModel)

    @cached_property
    def compiled(self) -> bool:
        """Whether any part of the denoiser runs under torch.compile."""
        return self.outer is not self.model or any(map(compiled_in_place, self.model.modules()))

    @property
    def checkpointed(self) -> bool:
        """Whether gradient checkpointing recomputes parts of the forward pass."""
        return bool(self.model.is_gradient_checkpointing)

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

    @staticmethod
    def reproducible(stock: Any) -> bool:
        """Whether `UNetProcessor` computes what this stock processor does."""
        return type(stock) in PLAIN

    def latent_channels(self) -> int:
        """Channels of the latents; inpainting UNets take more, the rest being conditions."""
        return int(self.model.config.out_channels)

    def latent_grid(self, sample: torch.Tensor) -> Grid:
        return 1, int(sample.shape[2]), int(sample.shape[3])

    @staticmethod
    def text(outputs: tuple) -> Text:
        """The result of `encode_prompt`: (positive, negative) or (positive, negative, pooled, negative pooled)."""
        return Text(*outputs)

    @staticmethod
    def outputs(text: Text, like: tuple) -> tuple:
        return (text.positive, text.negative, text.pooled, text.negative_pooled)[: len(like)]

    def blank_call(
        self, site: Site, step: Step, latents: Grid, batch: int, text_tokens: int, like: torch.Tensor
    ) -> Call:
        """A call without contents, for asking a control for its mask before the model runs (torch.compile)."""
        queries = TokenLayout.of_latents(site.grid(latents))
        keys = queries if site.kind == "self" else TokenLayout.of_text(text_tokens)
        empty = like.new_empty(batch, 1, 0, 1)
        return Call(site, step, "cond", empty, empty, empty, 1.0, queries, keys)

    def compiled_blocks(self) -> list[tuple[torch.nn.Module, Callable]]:
        """The transformer blocks that are compiled one by one, with what gives each its own masks by site kind."""
        sites = [site for site, _ in self.sites()]
        return [
            (module, partial(_with_block_masks, [site for site in sites if site.name.startswith(name + ".")]))
            for name, module in self.model.named_modules()
            if re.search(r"\.transformer_blocks\.\d+$", name) and compiled_in_place(module)
        ]

    @staticmethod
    def with_source(kwargs: dict[str, Any], source: Any) -> dict[str, Any]:
        """The denoiser's keyword arguments with `source` to be asked for work in place of the installation.

        Gradient checkpointing runs layers again in autograd's own threads, which do not know our context variable.
        """
        return {**kwargs, "cross_attention_kwargs": {**(kwargs.get("cross_attention_kwargs") or {}), SOURCE: source}}

    @staticmethod
    def with_masks(kwargs: dict[str, Any], masks: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The denoiser's keyword arguments with masks by site name added, the door into compiled graphs."""
        return {
            **kwargs,
            "cross_attention_kwargs": {**(kwargs.get("cross_attention_kwargs") or {}), MASKS: masks},
        }


def _with_block_masks(sites: list[Site], call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    extra = kwargs.get("cross_attention_kwargs") or {}
    if MASKS in extra:
        extra = dict(extra)
        masks = extra.pop(MASKS)
        extra[BLOCK_MASKS] = {site.kind: masks[site.name] for site in sites if site.name in masks}
        kwargs = {**kwargs, "cross_attention_kwargs": extra}
    return call(*args, **kwargs)


def _uncompiled(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)
