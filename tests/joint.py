"""One call of a joint attention layer under controls, without a model."""

from __future__ import annotations

from typing import Any

import torch

import attnctrl as ac
from attnctrl.processors.work import Branch, Work
from attnctrl.report import Report
from attnctrl.sampling import Active
from attnctrl.sites import Call, Grid, Site, Step, TokenLayout

SITE = Site("block.attn", "joint", "", 0)
STEP = Step(0, 4, 1000.0, 1.0)


def joint_call(
    grid: Grid, text: int, heads: int, head_dim: int, padding: torch.Tensor | None = None, gradient: bool = False
) -> Call:
    """Random queries, keys and values of [text, latents]; padding: the model's own mask."""
    latents = grid[0] * grid[1] * grid[2]
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(3, 1, heads, text + latents, head_dim, generator=generator)
    query, key, value = (tensor.clone().requires_grad_(gradient) for tensor in tensors)
    layout = TokenLayout(slice(text, text + latents), slice(0, text), grid)
    return Call(SITE, STEP, "cond", query, key, value, head_dim**-0.5, layout, layout, padding)


def work(call: Call, *controls: ac.Control, states: tuple[Any, ...] = (), observe: Any = None) -> Work:
    """What a processor would be asked to do under these controls; states: what their `begin` returned."""
    given = (*states, *[None] * (len(controls) - len(states)))
    active = tuple(
        Active(i, control, state, frozenset(control.points()))
        for i, (control, state) in enumerate(zip(controls, given, strict=True))
    )
    grid = call.queries.grid
    assert grid is not None
    text = call.keys.text.stop - call.keys.text.start
    return Work(STEP, grid, text, (Branch("cond", slice(0, 1)),), {"cond": active}, Report(), observe)
