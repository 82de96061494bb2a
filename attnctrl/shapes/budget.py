"""How long a training stage runs, its learning rate, its checkpoints: the same for every stage."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .crew import SOLO, Crew


@dataclass(frozen=True)
class Budget:
    """A number of steps (reproducible on any machine) or of minutes (ends on time); exactly one is given.

    Raises:
        ValueError: both or neither is given.
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give either steps or minutes")

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget used, 0 to 1."""
        used = step / self.steps if self.steps is not None else seconds / (60 * (self.minutes or 1e-9))
        return min(1.0, used)


def learning_rate(peak: float, progress: float, step: int, warmup: int, flat: float = 0.0) -> float:
    """Linear warm-up over `warmup` steps, `peak` until `flat` of the budget, then a half cosine to 0."""
    fall = max(0.0, progress - flat) / (1 - flat)
    return peak * min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * fall))


@dataclass
class Stage:
    """Position of one stage and its checkpoint file; `state` holds what must survive an interruption.

    Objects with `state_dict`/`load_state_dict` only. Randomness is not stored: every step draws from a generator
    seeded by (seed, step), so a resumed run repeats an uninterrupted one.
    """

    path: Path
    budget: Budget
    state: dict[str, Any]
    crew: Crew = SOLO
    every_seconds: float = 180.0
    step: int = 0
    seconds: float = 0.0
    _tick: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)

    def resume(self) -> bool:
        """Load the checkpoint if there is one; True if there was."""
        if not self.path.exists():
            return False
        saved = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, part in self.state.items():
            part.load_state_dict(saved["state"][name])
        self.step, self.seconds = saved["step"], saved["seconds"]
        return True

    @property
    def progress(self) -> float:
        """Share of the budget used, 0 to 1."""
        return self.budget.progress(self.step, self.seconds)

    def advance(self) -> None:
        """Count one finished step, and write a checkpoint when the last one is old."""
        now = time.monotonic()
        self.seconds += now - self._tick
        self._tick = now
        if self.budget.steps is None:
            self.seconds = self.crew.agree(self.seconds)
        self.step += 1
        if now - self._saved > self.every_seconds:
            self.save()

    def start_clock(self) -> None:
        """Do not count the time until now (loading, compiling) against a budget of minutes."""
        self._tick = self._saved = time.monotonic()

    def save(self) -> None:
        """Write the checkpoint, whole or not at all; of several processes only the first writes."""
        self._saved = time.monotonic()
        if self.crew.rank:
            return
        state = {name: part.state_dict() for name, part in self.state.items()}
        partial = self.path.with_suffix(".partial")
        torch.save({"state": state, "step": self.step, "seconds": self.seconds}, partial)
        os.replace(partial, self.path)

    def bar(self, label: str) -> Any:
        """A tqdm progress bar in thousandths of the budget."""
        done = int(1000 * self.progress)
        return tqdm(total=1000, initial=done, desc=label, unit="/1000", mininterval=10, disable=self.crew.rank > 0)

    @staticmethod
    def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
        """Set the learning rate of every parameter group."""
        for group in optimiser.param_groups:
            group["lr"] = rate
