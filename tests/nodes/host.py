"""A stand-in for ComfyUI: tiny models, a patcher and a sampler that make the calls of its own, in their order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
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


# model and patcher ----------------------------------------------------------------------------------------------
class Executor:
    """A chain of wrappers around a function."""

    def __init__(self, original: Callable, class_obj: Any, wrappers: list[Callable]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](Executor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)

    __call__ = execute


def wrappers(options: dict, name: str) -> list[Callable]:
    return [one for some in options.get("wrappers", {}).get(name, {}).values() for one in some]


class Sampling:
    """sigma falls from 10 to 0 as the percentage rises."""

    sigma_max = torch.tensor(10.0)

    def percent_to_sigma(self, percent: float) -> float:
        return 999999999.9 if percent <= 0 else 10.0 * (1.0 - percent)

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma * 99.9


class BaseModel(nn.Module):
    manual_cast_dtype = None

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.diffusion_model, self.model_sampling = network, Sampling()

    def get_dtype(self) -> torch.dtype:
        return torch.float32

    def apply_model(self, x: Any, t: Any, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
                    transformer_options: dict | None = None, **kwargs: Any) -> torch.Tensor:  # fmt: skip
        options = transformer_options or {}
        chain = Executor(self._apply_model, self, wrappers(options, "apply_model"))
        return chain.execute(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _apply_model(self, x: Any, t: Any, c_concat: Any, context: Any, control: Any, options: dict) -> torch.Tensor:
        sigma = t.view(-1, *[1] * (x.ndim - 1))
        return x - sigma * self.diffusion_model(x / (sigma**2 + 1) ** 0.5, context, options)


class Patcher:
    """What nodes call of ModelPatcher; a clone shares the weights and copies the options deeply, but no functions."""

    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Callable]]] = {}

    def clone(self) -> Patcher:
        made = Patcher(self.model)
        made.model_options = copy.deepcopy(self.model_options)
        made.wrappers = {name: {k: list(v) for k, v in some.items()} for name, some in self.wrappers.items()}
        return made

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def get_wrappers(self, name: str, key: str) -> list[Callable]:
        return self.wrappers.get(name, {}).get(key, [])

    def remove_wrappers_with_key(self, name: str, key: str) -> None:
        self.wrappers.get(name, {}).pop(key, None)

    def add_wrapper_with_key(self, name: str, key: str, wrapper: Callable) -> None:
        self.wrappers.setdefault(name, {}).setdefault(key, []).append(wrapper)

    def set_model_sampler_post_cfg_function(self, function: Callable) -> None:
        known = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = [*known, function]

    def set_model_patch(self, patch: Callable, name: str) -> None:
        self.model_options["transformer_options"].setdefault("patches", {}).setdefault(name, []).append(patch)

    def set_model_patch_replace(self, patch: Callable, name: str, *key: Any) -> None:
        tables = self.model_options["transformer_options"].setdefault("patches_replace", {})
        tables.setdefault(name, {})[key] = patch


# sampling -------------------------------------------------------------------------------------------------------
def calc_cond_batch(model: BaseModel, conds: list, x: torch.Tensor, sigma: torch.Tensor, model_options: dict) -> list:
    """Predictions for each list of conditionings; all of them in one batch, the last one first."""
    runs = [(number, one) for number, some in enumerate(conds) for one in (some or [])][::-1]
    length = max(one[0].shape[1] for _, one in runs)
    # Shorter texts are repeated.
    texts = [one[0].repeat(x.shape[0], length // one[0].shape[1], 1) for _, one in runs]
    options = dict(model_options["transformer_options"])
    options |= {"cond_or_uncond": [n for n, _ in runs], "uuids": [id(one) for _, one in runs], "sigmas": sigma}
    rows = [x] * len(runs)
    out = model.apply_model(
        torch.cat(rows), sigma.repeat(len(runs)), c_crossattn=torch.cat(texts), transformer_options=options
    ).chunk(len(runs))
    found = [[o for o, (n, _) in zip(out, runs, strict=True) if n == number] for number in range(len(conds))]
    return [torch.stack(some).mean(dim=0) if some else None for some in found]


def sampling_function(
    model: BaseModel, x: Any, sigma: Any, positive: Any, negative: Any, cfg: float, options: dict
) -> Any:
    negative = None if cfg == 1 else negative
    cond, uncond = (*calc_cond_batch(model, [positive, *([negative] if negative else [])], x, sigma, options), None)[:2]
    denoised = cond if uncond is None else uncond + cfg * (cond - uncond)
    for function in options.get("sampler_post_cfg_function", []):
        denoised = function({
            "denoised": denoised, "cond": positive, "uncond": negative, "cond_scale": cfg, "model": model,
            "cond_denoised": cond, "uncond_denoised": uncond, "sigma": sigma, "model_options": options, "input": x,
        })  # fmt: skip
    return denoised


def sample(patcher: Patcher, noise: Any, positive: Any, negative: Any = None, cfg: float = 2.0, steps: int = 4) -> Any:
    """Euler from sigma 10 to 0."""
    options = copy.copy(patcher.model_options)
    options["transformer_options"] = {**options["transformer_options"], "wrappers": patcher.wrappers}
    sigmas = torch.linspace(10, 0, steps + 1)

    def outer(noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        x = noise * sigmas[0]
        for sigma, following in pairwise(sigmas):
            denoised = sampling_function(patcher.model, x, sigma.expand(len(x)), positive, negative, cfg, options)
            x = x + (x - denoised) / sigma * (following - sigma)
        return x

    with torch.inference_mode():
        return Executor(outer, None, wrappers(options["transformer_options"], "outer_sample")).execute(noise, sigmas)


# text -----------------------------------------------------------------------------------------------------------
class Tokenizer:
    """Words, marked at their end as CLIP's are; every text has TOKENS tokens."""

    def __init__(self) -> None:
        self.known = ["<|startoftext|>", "<|endoftext|>"]

    def number(self, piece: str) -> int:
        if piece not in self.known:
            self.known.append(piece)
        return self.known.index(piece)

    def untokenize(self, pairs: list) -> list:
        return [(pair, self.known[pair[0]]) for pair in pairs]


class Clip:
    def __init__(self) -> None:
        self.tokenizer = Tokenizer()
        self.table = torch.randn(64, TEXT, generator=torch.Generator().manual_seed(5))

    def tokenize(self, text: str) -> dict[str, list]:
        words = [self.tokenizer.number(word + "</w>") for word in text.lower().split()]
        assert len(words) <= TOKENS - 2, "one chunk is enough here"
        return {"l": [[(i, 1.0) for i in [0, *words, *[1] * (TOKENS - 1 - len(words))]]]}

    def encode_from_tokens_scheduled(self, pairs: dict[str, list]) -> list:
        found = self.table[[i for i, _ in pairs["l"][0]]]
        return [[(found + 0.1 * found.mean(dim=0))[None], {}]]


def made(network: Callable[[], nn.Module], seed: int = 0) -> Patcher:
    torch.manual_seed(seed)
    return Patcher(BaseModel(network()).requires_grad_(False))


unet, wan, flux = partial(made, UNetModel), partial(made, WanModel), partial(made, Flux)
