"""The readings from which a plan is made: each head's error under each pattern, and what that costs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Where
from attnctrl.controls.sparse.common import LATENTS
from attnctrl.controls.sparse.plan import Choice, Pattern, SparsePlan, cheapest
from attnctrl.kernels import masked_attention
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid


def head_errors(sparse: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Squared error relative to full attention's output, float32 (heads,); both (batch, heads, queries, head_dim)."""
    difference = (sparse.float() - full.float()).square().sum(dim=(0, 2, 3))
    return difference / full.float().square().sum(dim=(0, 2, 3)).clamp_min(1e-30)


@dataclass
class Tried:
    """What one pattern did in one layer and phase, call by call. errors: (heads,) each."""

    errors: list[torch.Tensor] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass
class Readings:
    """By (layer, phase): the seconds of full attention, and what each pattern did."""

    grid: Grid = (1, 0, 0)
    full: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    tried: dict[tuple[str, int], list[Tried]] = field(default_factory=dict)

    def plan(self, patterns: tuple[Pattern, ...], phases: int, budget: float) -> SparsePlan:
        """For every layer, phase and head the cheapest pattern within the budget.

        A phase without a reading takes that of the nearest one.
        """
        sites: dict[str, tuple[tuple[Choice, ...], ...]] = {}
        for name in dict.fromkeys(site for site, _ in self.full):
            known = [phase for site, phase in self.full if site == name]
            rows = [min(known, key=lambda k, p=p: (abs(k - p), k)) for p in range(phases)]  # type: ignore[misc]
            sites[name] = tuple(self._choices((name, phase), budget) for phase in rows)
        return SparsePlan(self.grid, phases, patterns, sites)

    def _choices(self, key: tuple[str, int], budget: float) -> tuple[Choice, ...]:
        whole = max(min(self.full[key]), 1e-9)
        means = [
            (torch.stack(t.errors).mean(dim=0), sum(t.densities) / len(t.densities), min(t.seconds) / whole)
            for t in self.tried[key]
        ]
        chosen = []
        for head in range(len(means[0][0])):
            tried = [Choice(n + 1, float(error[head]), density, cost) for n, (error, density, cost) in enumerate(means)]
            chosen.append(cheapest([Choice(0, 0.0, 1.0, 1.0), *tried], budget))
        return tuple(chosen)


@dataclass
class State:
    sampling: Sampling
    probes: list[tuple[Control, Any]]
    readings: Readings


@dataclass(frozen=True)
class SparseProbe(Control):
    """Full attention and, beside it in the conditional branch, every pattern: keeps what they differ by and cost."""

    paper: ClassVar[str] = ""
    fixes: ClassVar[str] = ""

    where: Where = field(default=LATENTS, kw_only=True)
    patterns: tuple[Pattern, ...] = ()
    phases: int = 4
    readings: Readings = field(default_factory=Readings, compare=False)

    def begin(self, sampling: Sampling) -> State:
        made = [pattern.make(fall_back=False) for pattern in self.patterns[1:]]
        self.readings.grid = sampling.latent_grid
        return State(sampling, [(one, one.begin(sampling)) for one in made], self.readings)

    def attend(self, call: Call, state: State) -> torch.Tensor:
        start = time.perf_counter()
        full = masked_attention(call.query, call.key, call.value, call.seen, call.scale)
        whole, found = self._since(start, call), state.readings
        key = call.site.name, min(int(call.step.progress * self.phases), self.phases - 1)
        found.full.setdefault(key, []).append(whole)
        visits = state.sampling.report.visits
        tried = found.tried.setdefault(key, [Tried() for _ in state.probes])
        for (control, own), one in zip(state.probes, tried, strict=True):
            start = time.perf_counter()
            result = control.attend(call, own)
            assert result is not None
            one.seconds.append(self._since(start, call))
            one.errors.append(head_errors(result, full).cpu())
            one.densities.append(float(visits.pop((call.site.name, call.step.index, call.branch)).share))
        return full

    @staticmethod
    def _since(start: float, call: Call) -> float:
        if call.query.is_cuda:
            torch.cuda.synchronize(call.query.device)
        return time.perf_counter() - start
