"""Attention made by hand, gradients by finite differences, and a Stable Diffusion that trains in no time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from attnctrl.shapes import load, models
from attnctrl.sites import Site
from attnctrl.stepmaps import SelfMap


def own_attention(blocks: Sequence[Sequence[int]]) -> SelfMap:
    """Self-attention in which each token sees its own block, evenly."""
    size = sum(map(len, blocks))
    states = torch.zeros(1, 1, size, len(blocks))
    for channel, block in enumerate(blocks):
        states[0, 0, list(block), channel] = 60.0
    return SelfMap(Site("own", "self", "", 0), (1, 1, size), states, states, None, 1.0)


def check_gradient(value: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, step: float = 1e-2) -> None:
    """The gradient of a float32 function along random directions, against central differences."""
    leaf = at.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    for seed in range(3):
        direction = torch.randn(at.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            slope = (value(at + step * direction) - value(at - step * direction)) / (2 * step)
        found = (gradient * direction).sum()
        assert abs(found) > 1e-4
        assert torch.allclose(found, slope, rtol=2e-2, atol=2e-4), (float(found), float(slope))


def small_model(folder: Path) -> Path:
    """The shapes world's pipeline with an untrained denoiser of 16 and 32 channels, saved."""
    pipe = load("sd")
    torch.manual_seed(0)
    pipe.unet = models.denoiser(block_out_channels=(16, 32), attention_head_dim=(2, 2))
    pipe.save_pretrained(folder)
    return folder
