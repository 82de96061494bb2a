"""Attention refocusing: cross- and self-attention losses that put each phrase's attention into its box."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Descent, Loss, Where, Window, param
from attnctrl.layout import Layout, Regions, resolve
from attnctrl.sampling import Sampling
from attnctrl.sites import Step
from attnctrl.stepmaps import StepMaps, blur, token_shares
from attnctrl.subjects import contenders

EARLY = 0.3  # step 15 of 50: until then the terms below the thresholds count too


def cross_refocus(
    maps: torch.Tensor, tokens: torch.Tensor, masks: torch.Tensor, early: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """CAR of the official code: the strongest attention of each word inside its box, in other boxes, and outside.

    maps: (batch, text tokens, latent tokens) in [0, 1]; tokens: (batch, regions, text tokens) bool;
    masks: (batch, regions, latent tokens) in [0, 1]. early: progress below 0.3.
    -> loss (batch,), least inside maximum over the words (batch,), 1 where there are none.
    """
    inside_mask = masks > 0
    union = inside_mask.any(dim=1, keepdim=True)
    spread = maps[:, None]

    def highest(where: torch.Tensor) -> torch.Tensor:
        return (spread * where[:, :, None]).amax(dim=-1)

    inside = highest(inside_mask)
    other = highest(union & ~inside_mask)
    background = highest((~union).expand_as(inside_mask))
    late = 1.0 if early else 0.0
    weight_in = torch.where(inside < 0.1, 6.0, torch.where(inside < 0.2, 1.0, late))
    weight_out = torch.where(other > 0.15, 4.0, torch.where(other > 0.1, 1.0, late))
    term = weight_in * (1 - inside) + weight_out * other + background / 2
    count = tokens.any(dim=-1).sum(dim=1).clamp(min=1)
    loss = (term * tokens).sum(dim=(1, 2)) / count
    least = inside.masked_fill(~tokens, 1.0).amin(dim=(1, 2))
    return loss, least


def self_refocus(outside: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """SAR: the attention that pixels of a box pay to pixels outside it, averaged over the box and over the boxes.

    outside: (batch, latent tokens, regions), for each query the attention mass outside each region;
    masks: (batch, regions, latent tokens). -> (batch,).
    """
    inside = (masks > 0).float()
    mass = (outside.transpose(1, 2) * inside).sum(dim=-1) / inside.sum(dim=-1).clamp(min=1)
    present = inside.any(dim=-1)
    return (mass * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)


def schedule(step: Step) -> tuple[float, int]:
    """The official code's (relative scale, iterations), its 50 steps taken as fractions of the run."""
    at = step.progress
    if at < 0.04:
        return 4.0, 2
    if at < 0.1:
        return 4.0, 6
    if at < 0.2:
        return 3.0, 3
    if at < 0.72:
        # Every fifth of 50 steps: the steps that enter a new tenth of the run.
        entered = math.floor(at * 10 + 1e-6) > math.floor((step.index - 1) / step.total * 10 + 1e-6)
        return (3.0 if at < 0.4 else 1.0), 2 if entered else 0
    return 0.0, 0


@dataclass(frozen=True)
class Refocus(Control):
    """Grounded Text-to-Image Synthesis with Attention Refocusing (Phung et al., CVPR 2024, arXiv 2306.05427).

    Loss = scale * s(t) * (cross_weight * CAR + self_weight * SAR), with the thresholds, weights and schedule of the
    official code. Before CAR the maps are made shares of the words (logits x100, softmax) and blurred. Departures:
    words are found by the tokenizer's offsets; boxes that cover part of a cell count it, so that no box is empty;
    each picture of a batch stops on its own. The code's scale 1 is tuned to GLIGEN; its authors advise ten times as
    much for plain models; on the shapes world 1 loses objects, and the default loses none. The descent ends when every
    word has 0.2 of some pixel in its box.
    In joint attention CAR reads shares of the attention to text, and SAR that of the latents among themselves.
    Few tokens compete for shares where the text has no start token, and `enough` is sooner reached.
    Families: all but SANA, whose self-attention has no maps: there self_weight must be 0.
    """

    paper: ClassVar[str] = "arXiv 2306.05427"
    fixes: ClassVar[str] = "objects in the wrong place or missing, from boxes"

    regions: Regions = ()
    scale: float = param(0.7, "step size, times the schedule's 4 to 1", 0, 1000)
    cross_weight: float = param(1.0, "weight of the cross-attention loss", 0, 10)
    self_weight: float = param(1.0, "weight of the self-attention loss", 0, 10)
    enough: float = param(0.2, "a word needs no more once it has this share of a pixel in its box", 0, 1)
    window: Window = field(default=Window(0.0, 0.72), kw_only=True)
    where: Where = field(default=Where(kinds=("cross", "self", "joint"), near=1 / 16), kw_only=True)

    @property
    def idle(self) -> bool:
        return (
            self.window.empty
            or self.scale == 0
            or not any(self.regions)
            or (self.cross_weight == 0 and self.self_weight == 0)
        )

    def begin(self, sampling: Sampling) -> tuple[Layout, torch.Tensor]:
        return resolve(sampling, self.regions, self.where, how="any"), contenders(sampling)

    def descent(self, step: Step) -> Descent | None:
        scale, iterations = schedule(step)
        return Descent(self.scale * scale, iterations)

    def loss(self, maps: StepMaps, step: Step, state: Any) -> Loss:
        layout, competing = state
        probs, grid = maps.mean_cross()
        masks = layout.mask(grid, "any")
        shares = blur(token_shares(probs, competing).transpose(1, 2), grid)
        value, least = cross_refocus(shares, layout.tokens, masks, step.progress < EARLY)
        value = self.cross_weight * value
        if self.self_weight:
            outside = (masks == 0).float().transpose(1, 2)
            layers = [self_refocus(layer.apply(outside), masks) for layer in maps.self_layers(grid)]
            value = value + self.self_weight * torch.stack(layers).mean(dim=0)
        return Loss(value, least >= self.enough)
