"""ComfyUI's own diffusion models as attention sites, read by looking at them: nothing of ComfyUI is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnctrl.sites import Grid, Site

PARTS = {"input": "down", "middle": "mid", "output": "up"}


@dataclass(frozen=True)
class Architecture:
    """A covered diffusion model.

    kind: "unet", "flux" or "wan". sites: in the order of the forward pass. patch: latents per token along (frames,
    height, width). layers: by the names of sites whose keys are text alone, the module that projects it.
    blocks: the keys of ComfyUI's table "dit", for transformers.
    """

    kind: str
    sites: tuple[Site, ...]
    patch: Grid
    layers: Mapping[str, Any]
    blocks: tuple[tuple[str, int], ...] = ()

    def grid(self, latents: torch.Tensor) -> Grid:
        """The token grid of latents (batch, channels, [frames,] height, width); models pad to whole tokens."""
        sizes = latents.shape[2:] if latents.ndim == 5 else (1, *latents.shape[2:])
        frames, height, width = (-(-int(size) // unit) for size, unit in zip(sizes, self.patch, strict=True))
        return frames, height, width

    def project(self, name: str, heads: int) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None:
        """Text (batch, tokens, channels) -> key and value of a site, (batch, heads, tokens, head_dim)."""
        layer = self.layers.get(name)
        if layer is None:
            return None

        def keys_values(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            key, value = (to(text).unflatten(-1, (heads, -1)).transpose(1, 2) for to in (layer.to_k, layer.to_v))
            return key, value

        return keys_values


def architecture_of(model: Any) -> Architecture | str:
    """What is known of a diffusion model, or why it is not covered."""
    name = type(model).__name__
    if name == "UNetModel":
        return _unet(model)
    if name == "Flux":
        doubles, singles = len(model.double_blocks), len(model.single_blocks)
        blocks = [("double_block", i) for i in range(doubles)] + [("single_block", i) for i in range(singles)]
        sites = tuple(Site(f"{part}.{i}", "joint", "", order) for order, (part, i) in enumerate(blocks))
        return Architecture("flux", sites, (1, model.patch_size, model.patch_size), {}, tuple(blocks))
    if name == "WanModel":
        blocks = [("double_block", i) for i in range(len(model.blocks))]
        found = [(f"{part}.{i}.{kind}", kind) for part, i in blocks for kind in ("self", "cross")]
        sites = tuple(Site(one, kind, "", order) for order, (one, kind) in enumerate(found))
        frames, height, width = model.patch_size
        return Architecture("wan", sites, (frames, height, width), {}, tuple(blocks))
    return f"{name} is not covered: covered are UNetModel (Stable Diffusion 1.x, 2.x and XL), Flux and WanModel"


def _unet(model: Any) -> Architecture | str:
    parts = [("input", i, block) for i, block in enumerate(model.input_blocks)]
    parts += [("middle", 0, model.middle_block)]
    parts += [("output", i, block) for i, block in enumerate(model.output_blocks)]
    sites: list[Site] = []
    layers: dict[str, Any] = {}
    depth = 0
    for part, number, block in parts:
        for layer in block if block is not None else ():
            kind = type(layer).__name__
            if kind == "SpatialVideoTransformer":
                return "UNetModel with layers of time is not covered"
            # A level's last block may be a strided convolution or a residual block that halves the grid.
            if kind == "Downsample" or (part == "input" and getattr(layer, "updown", False)):
                depth += 1
            elif kind == "Upsample" or (part == "output" and getattr(layer, "updown", False)):
                depth -= 1
            for index, one in enumerate(getattr(layer, "transformer_blocks", ())):
                for attention, of in (("attn1", "cross" if one.disable_self_attn else "self"), ("attn2", "cross")):
                    name = f"{part}.{number}.{index}.{attention}"
                    sites.append(Site(name, of, PARTS[part], len(sites), depth))
                    if of == "cross":
                        layers[name] = getattr(one, attention)
    return Architecture("unet", tuple(sites), (1, 1, 1), layers)


def why_not(model: Any, kinds: tuple[str, ...], extends_text: bool, projects: bool) -> str:
    """Why a control does not work in this diffusion model; empty where it does.

    kinds: of attention that it acts on. extends_text: whether it puts tokens behind the prompt of joint attention;
    projects: whether it makes keys of text itself.
    """
    known = architecture_of(model)
    if isinstance(known, str):
        return known
    has = {site.kind for site in known.sites}
    if not has & {*kinds}:
        return (
            f"the model has attention of the kinds {', '.join(sorted(has))}, and the method acts on {', '.join(kinds)}"
        )
    if extends_text and "joint" in has:
        return "in joint attention it needs further text in the sequence, which the pipeline nodes give it"
    if projects and not known.layers:
        return "it makes keys of text, which is known of UNets alone; use the pipeline nodes"
    return ""
