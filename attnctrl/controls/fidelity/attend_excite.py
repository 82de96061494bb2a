"""Attend-and-Excite: every subject must have a pixel that attends to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Descent, Loss, Where, Window, param
from attnctrl.controls.fidelity.descents import refined, step_size
from attnctrl.sampling import Sampling
from attnctrl.sites import Step
from attnctrl.stepmaps import StepMaps, blur, phrase_maps, token_shares
from attnctrl.subjects import Phrases, Subjects, flat, resolve_phrases

ENOUGH = (0.05, 0.5, 0.8)
"""Highest attention of the worst subject that ends each refinement."""


def neglect(maps: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """L = max over subjects of (1 - highest attention), the worst subject alone.

    maps: (batch, subjects, latent tokens) in [0, 1]; valid: (batch, subjects) bool. -> (batch,), 0 without subjects.
    """
    missing = (1 - maps.amax(dim=-1)).clamp(min=0)
    return missing.masked_fill(~valid, 0.0).amax(dim=-1)


def excited_maps(maps: StepMaps, subjects: Subjects) -> torch.Tensor:
    """The maps that Attend-and-Excite and its descendants read: word shares, blurred, mean over a phrase's tokens."""
    probs, grid = maps.mean_cross()
    return blur(phrase_maps(token_shares(probs, subjects.contenders), subjects.tokens), grid)


@dataclass(frozen=True)
class AttendExcite(Control):
    """Attend-and-Excite (Chefer et al., SIGGRAPH 2023, arXiv 2301.13826).

    z <- z - scale * sqrt(1 - progress / 2) * dL/dz in the first half of the run, the authors' step-size rule. With
    `refinements`, further descents at 0, 20 and 40 percent of the run until the worst subject has a pixel of 0.05, 0.5
    and 0.8 (20 at most in the official code); they triple the cost, and the default does without.
    phrases are the subjects, best their nouns; a phrase of several tokens counts by their mean map.
    Tokens that open the text (CLIP's start token, a chat) take no share, nor does padding behind other encoders. In
    joint attention the maps are shares of the attention to text.
    Families: all.
    """

    paper: ClassVar[str] = "arXiv 2301.13826"
    fixes: ClassVar[str] = "a named subject is missing"

    phrases: Phrases = ()
    scale: float = param(20.0, "step size at the start", 0, 1000)
    iterations: int = param(1, "descents per step", 0, 50)
    refinements: int = param(0, "further descents at most at 0, 20 and 40 percent of the run; 20 in the code", 0, 50)
    window: Window = field(default=Window(0.0, 0.5), kw_only=True)
    where: Where = field(default=Where(near=1 / 16), kw_only=True)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.scale == 0 or self.iterations + self.refinements == 0 or not flat(self.phrases)

    def begin(self, sampling: Sampling) -> Subjects:
        return resolve_phrases(sampling, self.phrases)

    def descent(self, step: Step) -> Descent:
        more = 0 if refined(step) is None else self.refinements
        return Descent(step_size(self.scale, step), self.iterations + more)

    def loss(self, maps: StepMaps, step: Step, state: Any) -> Loss:
        value, moment = neglect(excited_maps(maps, state), state.valid), refined(step)
        last = value <= 1 - ENOUGH[moment] if self.refinements and moment is not None else None
        return Loss(value, last=last)
