"""What the losses of this task share: the step sizes and refinements of Attend-and-Excite, and a memory of one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnctrl.sites import Step

REFINED = (0.0, 0.2, 0.4)
"""When the methods refine, as fractions of the run: steps 0, 10 and 20 of 50."""


def step_size(scale: float, step: Step) -> float:
    """scale * sqrt(1 - progress / 2): Attend-and-Excite's sqrt of a line from 1 to 0.5."""
    return scale * math.sqrt(1 - step.progress / 2)


def refined(step: Step, moments: Sequence[float] = REFINED) -> int | None:
    """Which of `moments`, fractions of the run, comes due in this step: in the first one not before it."""
    due = [n for n, at in enumerate(moments) if math.ceil(at * step.total - 1e-9) == step.index]
    return due[-1] if due else None


@dataclass
class Memory:
    """What a sampling remembers of the step before, one row per picture. about: what the maps are of."""

    about: Any
    before: torch.Tensor | None = None
    latest: torch.Tensor | None = None
    step: int = -1

    def exchange(self, step: Step, maps: torch.Tensor) -> torch.Tensor | None:
        """The maps of the step before, None in the first; keeps these, without their gradient, for the next one.

        Within a step the latest evaluation counts. Schedulers that call the denoiser twice have two steps with one
        descent, so that nothing is compared with itself.
        """
        if step.index != self.step:
            self.before, self.step = self.latest, step.index
        self.latest = maps.detach()
        return self.before
