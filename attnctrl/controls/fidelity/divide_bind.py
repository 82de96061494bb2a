"""Divide & Bind: every subject's map is to vary, and each attribute's to lie where its noun's does."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from attnctrl.control import Control, Descent, Loss, Where, Window, param
from attnctrl.controls.fidelity.attend_excite import excited_maps
from attnctrl.controls.fidelity.descents import refined, step_size
from attnctrl.pairs import Pairs, Words, named, resolve_pairs
from attnctrl.sampling import Sampling
from attnctrl.sites import Grid, Step
from attnctrl.stepmaps import StepMaps
from attnctrl.subjects import Phrases

ENOUGH = (0.05, 0.2, 0.3)
"""Total variation that ends each refinement."""


def total_variation(maps: torch.Tensor, grid: Grid, last_row: bool = False) -> torch.Tensor:
    """Mean absolute difference of neighbours, along rows plus along columns.

    maps: (batch, words, frames * height * width) -> (batch, words). last_row: compare each row with the last one
    instead of its neighbour, as the official code does.
    """
    pictures = maps.unflatten(-1, grid)
    above = pictures[..., -1:, :] if last_row else pictures[..., :-1, :]
    total = torch.zeros_like(maps[..., 0])
    for difference in (pictures[..., :-1] - pictures[..., 1:], above - pictures[..., 1:, :]):
        if difference.numel():  # a side of one cell has no neighbours
            total = total + difference.abs().mean(dim=(-3, -2, -1))
    return total


def binding(noun: torch.Tensor, attribute: torch.Tensor, varied: torch.Tensor, normalised: bool = True) -> torch.Tensor:
    """The Jensen-Shannon divergence of a noun's and an attribute's map where these are high; in [0, ln 2].

    The attribute is scaled to the noun's maximum, both are softmaxed over the latent tokens, and what is below 0.3
    (`varied` nouns, TV >= 0.1: 0.2) of the noun's maximum counts for nothing. normalised: make what is left sum to 1;
    the official code does not. noun, attribute: (..., latent tokens); varied: (...) bool. -> (...).
    """
    high = noun.amax(dim=-1, keepdim=True)
    attribute = attribute * high / attribute.amax(dim=-1, keepdim=True).clamp(min=1e-8)
    p, q = noun.softmax(dim=-1), attribute.softmax(dim=-1)
    floor = torch.where(varied, 0.2, 0.3)[..., None].to(p.dtype) * p.amax(dim=-1, keepdim=True)
    p, q = (p - floor).relu() + 1e-5, (q - floor).relu() + 1e-5
    if normalised:
        p, q = p / p.sum(dim=-1, keepdim=True), q / q.sum(dim=-1, keepdim=True)
    middle = ((p + q) / 2).log()
    return ((p * (p.log() - middle)).sum(dim=-1) + (q * (q.log() - middle)).sum(dim=-1)) / 2


def mean_binding(maps: torch.Tensor, words: Words, varied: torch.Tensor, normalised: bool = True) -> torch.Tensor:
    """For each word the mean `binding` to the attributes of its pair, 0 where it has none: (batch, words)."""
    pairs = words.bound
    shape = (*pairs.shape, maps.shape[-1])
    apart = binding(maps[:, :, None].expand(shape), maps[:, None].expand(shape), varied[..., None], normalised)
    return (apart * pairs).sum(dim=-1) / pairs.sum(dim=-1).clamp(min=1)


def bind_weight(step: Step) -> float:
    """1, 5 and 10 in the first, second and later fifths of the run."""
    return 1.0 if step.progress < 0.2 else 5.0 if step.progress < 0.4 else 10.0


@dataclass(frozen=True)
class DivideBind(Control):
    """Divide & Bind Your Attention (Li et al., BMVC 2023, arXiv 2307.10864).

    The loss of a subject is minus the total variation of its map plus `bind_weight` times a growing factor times the
    divergence from its attributes' maps; the worst subject counts. Maps, step sizes and the refinements at 0, 20 and
    40 percent, which end when every subject varies by 0.05, 0.2 and 0.3, are those of Attend-and-Excite's family; the
    first refinement may take two and a half times as many descents. variant "code" reproduces two slips of the
    official code: rows are compared with the last row, and the divergence is of maps that do not sum to 1. Departure
    from both: attributes are read at the nouns' own sites, not at finer ones.
    phrases, pairs: see `resolve_pairs`; by default every pair of the prompt. Families: all.
    """

    paper: ClassVar[str] = "arXiv 2307.10864"
    fixes: ClassVar[str] = "a named subject is missing, a colour on the wrong thing"

    phrases: Phrases | None = None
    pairs: Pairs | None = None
    scale: float = param(20.0, "step size at the start", 0, 1000)
    bind_weight: float = param(1.0, "weight of the divergence, times 1 to 10 in the course of the run", 0, 10)
    variant: str = param("paper", "whose formulas", choices=("paper", "code"))
    iterations: int = param(1, "descents per step", 0, 50)
    refinements: int = param(20, "further descents at most at 20 and 40 percent of the run", 0, 50)
    window: Window = field(default=Window(0.0, 0.5), kw_only=True)
    where: Where = field(default=Where(near=1 / 16), kw_only=True)

    @property
    def idle(self) -> bool:
        nothing = self.iterations == 0 and self.refinements == 0
        return self.window.empty or self.scale == 0 or nothing or not named(self.phrases, self.pairs)

    def begin(self, sampling: Sampling) -> Words:
        return resolve_pairs(sampling, self.phrases, self.pairs)

    def descent(self, step: Step) -> Descent:
        moment = refined(step)
        more = 0 if moment is None else math.ceil(self.refinements * (2.5 if moment == 0 else 1.0))
        return Descent(step_size(self.scale, step), self.iterations + more)

    def loss(self, maps: StepMaps, step: Step, state: Words) -> Loss:
        _, grid = maps.mean_cross()
        found = excited_maps(maps, state)
        varies = total_variation(found, grid, last_row=self.variant == "code")
        value = -varies
        if self.bind_weight:
            apart = mean_binding(found, state, varies >= 0.1, normalised=self.variant == "paper")
            value = value + self.bind_weight * bind_weight(step) * apart
        some = state.noun.any(dim=-1)
        worst = torch.where(some, value.masked_fill(~state.noun, float("-inf")).amax(dim=-1), 0.0)
        moment = refined(step)
        if moment is None or not self.refinements:
            return Loss(worst)
        least = varies.masked_fill(~state.noun, float("inf")).amin(dim=-1)
        return Loss(worst, last=least >= ENOUGH[moment])
