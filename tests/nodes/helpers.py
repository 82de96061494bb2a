"""What the tests of native nodes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnctrl.nodes.catalog import NODES
from tests.nodes import host

NODE = {node.id: node for node in NODES}
SITES = [("input", 0), ("input", 2), ("middle", 0), ("output", 0), ("output", 1)]
PROMPT = "a red circle and a square"
BOX = {"x0": 0.0, "y0": 0.0, "x1": 0.5, "y1": 1.0}


def apply(name: str, model: Any, **given: Any) -> Any:
    """A native node with the defaults of its ports, acting from the first step to the last."""
    node = NODE[name]
    defaults = {p.name: p.default for p in node.inputs if p.widget} | {"window_start": 0.0, "window_end": 1.0}
    needs = {"calc_cond_batch": host.calc_cond_batch}
    return node.run(model=model, **{**defaults, **given}, **{n: needs[n] for n in node.needs})[0]


def noise(*sizes: int) -> torch.Tensor:
    return torch.randn(2, host.CHANNELS, *(sizes or (8, 8)), generator=torch.Generator().manual_seed(1))


def left_half(tokens: int) -> torch.Tensor:
    """Which latents of a square grid lie in BOX."""
    side = int(tokens**0.5)
    return (torch.arange(tokens) % side < side // 2).float()


Scores = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]


def replacing(kind: str, change: Scores, places: list = SITES) -> Any:
    """The host's model with materialised attention in `kind`, whose scores are changed in the conditional rows."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (host.HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        rows = []
        for one, values, branch in zip(scores.chunk(len(extra["cond_or_uncond"])),
                                       v.chunk(len(extra["cond_or_uncond"])), extra["cond_or_uncond"],
                                       strict=True):  # fmt: skip
            rows.append(change(one, values, extra) if branch == 0 else one.softmax(-1) @ values)
        return torch.cat(rows).transpose(1, 2).flatten(2)

    patcher = host.unet()
    for place in places:
        patcher.set_model_patch_replace(attention, kind, *place)
    return patcher


def close(found: torch.Tensor, wanted: torch.Tensor, stock: torch.Tensor) -> None:
    """Found is as wanted, and both differ from the stock result by far more than rounding."""
    apart = (wanted - stock).abs().max()
    assert apart > 1e-3
    assert (found - wanted).abs().max() < 1e-3 * apart


def masked_wan(visible: torch.Tensor) -> Any:
    """The host's video model whose latents see each other as a mask says, by a plain override."""
    patcher = host.wan()

    def override(func: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        more = {"mask": visible} if k.shape[1] == q.shape[1] else {}
        return func(q, k, v, *args, **kwargs, **more)

    patcher.model_options["transformer_options"]["optimized_attention_override"] = override
    return patcher
