"""One call of an attention layer under a sparse control, without a model."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

import attnctrl as ac
from attnctrl.kernels import attention
from attnctrl.report import Report
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid, Site, Step, TokenLayout
from tests import methods
from tests.methods import step

SITES = tuple(Site(f"blocks.{i}.attn", "joint", "", i) for i in range(3))
GRID = (5, 6, 10)
"""Frames of 60 tokens: no block size divides them, nor do tiles their sides."""


def sampling(grid: Grid = GRID) -> Sampling:
    """A sampling of a model with three layers."""
    made = methods.sampling()
    made.sites, made.latent_grid = list(SITES), grid
    return made


def a_call(
    grid: Grid = GRID,
    before: int = 0,
    after: int = 0,
    heads: int = 2,
    head_dim: int = 8,
    batch: int = 1,
    at: Step | None = None,
    layer: int = 0,
    branch: str = "cond",
    seed: int = 0,
    gradient: bool = False,
    spread: float = 1.0,
) -> Call:
    """Random query, key and value of [text, latents, text]; spread: their standard deviation."""
    count = prod(grid)
    generator = torch.Generator().manual_seed(seed)
    shape = 3, batch, heads, before + count + after, head_dim
    tensors = spread * torch.randn(shape, generator=generator)
    query, key, value = (tensor.clone().requires_grad_(gradient) for tensor in tensors)
    text = slice(before + count, before + count + after) if after else slice(0, before)
    layout = TokenLayout(slice(before, before + count), text, grid)
    at = at or step(40)
    return Call(SITES[layer], at, branch, query, key, value, head_dim**-0.5, layout, layout)


def attended(control: ac.Control, call: Call, state: Any = None) -> tuple[torch.Tensor | None, Report]:
    """What the control makes of the call, and the report."""
    given = sampling(call.queries.grid) if state is None else None
    state = control.begin(given) if state is None else state
    return control.attend(call, state), state.report


def dense(call: Call, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Full attention of the call, or that under a mask."""
    return attention(call.query, call.key, call.value, mask, call.scale)
