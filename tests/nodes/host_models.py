"""The tiny models of the stand-in for ComfyUI, with the hooks of its own where they stand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS, WIDTH, HEADS, TEXT, TOKENS = 4, 16, 2, 12, 8
"""Latent channels, channels of layers, heads, channels of text, tokens of a text."""


# attention ------------------------------------------------------------------------------------------------------
def backend(
    query: Any, key: Any, value: Any, heads: int, mask: Any = None, attn_precision: Any = None,
    skip_reshape: bool = False, skip_output_reshape: bool = False, **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    """An attention function of the host: (batch, tokens, heads * head_dim), or split with skip_reshape.

    The host's functions name the first three as they like.
    """
    q, k, v = query, key, value
    if not skip_reshape:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    if mask is not None and mask.ndim == 3:
        mask = mask[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def optimized_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Delegates to the override in transformer_options, which gets the function to fall back to."""
    options = kwargs.get("transformer_options") or {}
    inside = kwargs.get("_inside_attn_wrapper", False)
    kwargs["_inside_attn_wrapper"] = True
    if not inside and "optimized_attention_override" in options:
        return options["optimized_attention_override"](backend, *args, **kwargs)
    return backend(*args, **kwargs)


class Attention(nn.Module):
    def __init__(self, context: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(c, WIDTH, bias=False) for c in (WIDTH, context, context))
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any, context: Any, value: Any, options: dict) -> torch.Tensor:
        context = x if context is None else context
        value = context if value is None else value
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(value)
        return self.to_out(optimized_attention(q, k, v, HEADS, attn_precision=None, transformer_options=options))


class Block(nn.Module):
    """Patch, replacement or attention, output patch; first of the pixels among themselves, then to the text."""

    disable_self_attn = False

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(WIDTH), Attention(TEXT)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, context: torch.Tensor, options: dict) -> torch.Tensor:
        x = x + self.one("attn1", self.norm1(x), None, options)
        return x + self.one("attn2", self.norm2(x), context, options)

    def one(self, name: str, n: torch.Tensor, context: Any, options: dict) -> torch.Tensor:
        patches, replaced = options.get("patches", {}), options.get("patches_replace", {}).get(name, {})
        extra = {k: v for k, v in options.items() if k not in ("patches", "patches_replace")}
        extra |= {"n_heads": HEADS, "dim_head": WIDTH // HEADS}
        layer, value = getattr(self, name), None
        if f"{name}_patch" in patches:
            context = n if context is None else context
            value = context
            for patch in patches[f"{name}_patch"]:
                n, context, value = patch(n, context, value, extra)
        place = (*options["block"], options["block_index"])
        place = place if place in replaced else options["block"]
        if place in replaced:
            context = n if context is None else context
            value = context if value is None else value
            n = layer.to_out(replaced[place](layer.to_q(n), layer.to_k(context), layer.to_v(value), extra))
        else:
            n = layer(n, context, value, options)
        for patch in patches.get(f"{name}_output_patch", []):
            n = patch(n, extra)
        return n


class SpatialTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block()])

    def forward(self, x: torch.Tensor, context: torch.Tensor, options: dict) -> torch.Tensor:
        options["activations_shape"] = list(x.shape)
        h = x.flatten(2).transpose(1, 2)
        for i, block in enumerate(self.transformer_blocks):
            options["block_index"] = i
            h = block(h, context, options)
        return x + h.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    def forward(self, x: torch.Tensor, context: Any, options: dict) -> torch.Tensor:
        return F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    def forward(self, x: torch.Tensor, context: Any, options: dict) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2.0)


class UNetModel(nn.Module):
    """Attention on the latents' grid and on half of it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(CHANNELS, WIDTH, 1), nn.Conv2d(WIDTH, CHANNELS, 1)
        layers = ([SpatialTransformer()], [Downsample()], [SpatialTransformer()])
        self.input_blocks = nn.ModuleList([nn.ModuleList(some) for some in layers])
        self.middle_block = nn.ModuleList([SpatialTransformer()])
        layers = ([SpatialTransformer(), Upsample()], [SpatialTransformer()])
        self.output_blocks = nn.ModuleList([nn.ModuleList(some) for some in layers])

    def forward(self, x: torch.Tensor, context: torch.Tensor, options: dict) -> torch.Tensor:
        options["original_shape"] = list(x.shape)
        h = self.enter(x)
        parts = (("input", self.input_blocks), ("middle", [self.middle_block]), ("output", self.output_blocks))
        for part, blocks in parts:
            for i, block in enumerate(blocks):
                options["block"] = (part, i)
                for layer in block:
                    h = layer(h, context, options)
        return self.leave(h)


class WanBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.text = Attention(WIDTH), Attention(TEXT)

    def forward(self, x: torch.Tensor, context: torch.Tensor, options: dict) -> torch.Tensor:
        x = x + self.own(x, None, None, options)
        return x + self.text(x, context, None, options)


class WanModel(nn.Module):
    """Latents (batch, channels, frames, height, width), one token each; blocks pass through the table "dit"."""

    patch_size = (1, 1, 1)

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.blocks = nn.ModuleList(WanBlock() for _ in range(blocks))

    def forward(self, x: torch.Tensor, context: torch.Tensor, options: dict) -> torch.Tensor:
        h = self.enter(x.flatten(2).transpose(1, 2))
        table = options.get("patches_replace", {}).get("dit", {})
        for i, block in enumerate(self.blocks):

            def original(args: dict, block: nn.Module = block) -> dict:
                return {"img": block(args["img"], args["txt"], args["transformer_options"])}

            args = {"img": h, "txt": context, "transformer_options": options}
            key = ("double_block", i)
            h = (table[key](args, {"original_block": original}) if key in table else original(args))["img"]
        return self.leave(h).transpose(1, 2).reshape(x.shape)


class FluxBlock(nn.Module):
    """Text and latents in one sequence, text first, heads split already."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, both: torch.Tensor, options: dict) -> torch.Tensor:
        q, k, v = self.qkv(both).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = optimized_attention(q, k, v, HEADS, skip_reshape=True, mask=None, transformer_options=options)
        return both + self.out(out)


class Flux(nn.Module):
    """Blocks of two streams, then of one; a picture's latents are tokens."""

    patch_size = 1

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.read, self.leave = (
            nn.Linear(a, b) for a, b in ((CHANNELS, WIDTH), (TEXT, WIDTH), (WIDTH, CHANNELS))
        )
        self.double_blocks, self.single_blocks = (nn.ModuleList(FluxBlock() for _ in range(count)) for count in (1, 2))

    def forward(self, x: torch.Tensor, context: torch.Tensor, options: dict) -> torch.Tensor:
        img, txt = self.enter(x.flatten(2).transpose(1, 2)), self.read(context)
        table, count = options.get("patches_replace", {}).get("dit", {}), txt.shape[1]

        def double(args: dict) -> dict:
            both = self.double_blocks[0](torch.cat([args["txt"], args["img"]], dim=1), args["transformer_options"])
            return {"txt": both[:, :count], "img": both[:, count:]}

        args = {"img": img, "txt": txt, "transformer_options": options}
        key = ("double_block", 0)
        out = table[key](args, {"original_block": double}) if key in table else double(args)
        both = torch.cat([out["txt"], out["img"]], dim=1)
        for i, block in enumerate(self.single_blocks):

            def single(args: dict, block: nn.Module = block) -> dict:
                return {"img": block(args["img"], args["transformer_options"])}

            args, key = {"img": both, "transformer_options": options}, ("single_block", i)
            both = (table[key](args, {"original_block": single}) if key in table else single(args))["img"]
        return self.leave(both[:, count:]).transpose(1, 2).reshape(x.shape)
