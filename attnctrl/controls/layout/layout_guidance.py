"""Layout guidance: each word's attention is pulled into its box by gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Descent, Loss, Where, Window, param
from attnctrl.layout import Layout, Regions, resolve
from attnctrl.sampling import Sampling
from attnctrl.sites import Step
from attnctrl.stepmaps import StepMaps


def box_energy(probs: torch.Tensor, tokens: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """E = mean over words of (1 - sum(A M) / sum(A))^2 (equation 3), the mean over a region's words, then over regions.

    probs: (batch, latent tokens, text tokens); tokens: (batch, regions, text tokens) bool; masks: (batch, regions,
    latent tokens) in [0, 1]. -> (batch,), in [0, 1]; 0 without regions.
    """
    inside = masks @ probs / probs.sum(dim=1, keepdim=True).clamp(min=1e-8)
    words = tokens.sum(dim=-1)
    energy = ((1 - inside) ** 2 * tokens).sum(dim=-1) / words.clamp(min=1)
    return energy.sum(dim=1) / (words > 0).sum(dim=1).clamp(min=1)


@dataclass(frozen=True)
class LayoutGuidance(Control):
    """Training-Free Layout Control with Cross-Attention Guidance (Chen et al., WACV 2024, arXiv 2304.03373).

    The backward form: z <- z - scale * dE/dz, E averaged over layers, up to `iterations` times in the first steps,
    until E <= enough. Layers of several grids take part, each with masks of its own grid. The official code squares
    per head before it averages, and multiplies the step by sigma^2, which for an input of unit variance is the share
    of noise in it, near 1 in the window; here heads are averaged first and the factor is left out. It reads the middle
    block and the first of the up path; here every layer near 1/16 of the latents' tokens, and masks count the cells
    that a region covers in part. The defaults are what measures best on the shapes world.
    In joint attention A is the share of the attention to text.
    Families: all.
    """

    paper: ClassVar[str] = "arXiv 2304.03373"
    fixes: ClassVar[str] = "objects in the wrong place, from boxes or masks"

    regions: Regions = ()
    scale: float = param(60.0, "step size; 30 in the official code", 0, 1000)
    iterations: int = param(3, "descents per step at most; 5 in the official code", 0, 50)
    enough: float = param(0.0, "stop within a step when E is at most this; 0.2 in the official code", 0, 1)
    window: Window = field(default=Window(0.0, 0.4), kw_only=True)
    where: Where = field(default=Where(near=1 / 16), kw_only=True)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.scale == 0 or self.iterations == 0 or not any(self.regions)

    def begin(self, sampling: Sampling) -> Layout:
        return resolve(sampling, self.regions, self.where, how="coverage")

    def descent(self, step: Step) -> Descent:
        return Descent(self.scale, self.iterations)

    def loss(self, maps: StepMaps, step: Step, state: Any) -> Loss:
        layout: Layout = state
        layers = [box_energy(m.probs, layout.tokens, layout.mask(m.grid, "coverage")) for m in maps.cross_layers()]
        energy = torch.stack(layers).mean(dim=0)
        return Loss(energy, energy <= self.enough)
