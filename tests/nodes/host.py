"""A stand-in for ComfyUI: tiny models, a patcher and a sampler that make the calls of its own, in their order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from tests.nodes.host_models import CHANNELS, HEADS, TEXT, TOKENS, Flux, UNetModel, WanModel, backend

__all__ = ["CHANNELS", "HEADS", "TEXT", "TOKENS", "backend"]


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
    """Predictions for each list of conditionings, in one batch, the last one first, where their lengths allow that."""
    runs = [(number, one) for number, some in enumerate(conds) for one in (some or [])][::-1]
    length = max(one[0].shape[1] for _, one in runs)
    if any(length % one[0].shape[1] for _, one in runs):
        return [calc_cond_batch(model, [*[None] * n, some], x, sigma, model_options)[n] for n, some in enumerate(conds)]
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
