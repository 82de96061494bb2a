"""A plan of sparse attention: for every layer, part of the run and head the cheapest pattern that is near enough."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from attnctrl.control import Control
from attnctrl.controls.sparse.draft import Draft
from attnctrl.controls.sparse.neighborhood_tiles import NeighborhoodTiles
from attnctrl.controls.sparse.radial import Radial
from attnctrl.controls.sparse.sliding_tile import SlidingTile
from attnctrl.errors import ControlError
from attnctrl.sites import Grid

FORMAT = "attnctrl-sparse-plan-1"
FULL = "full"
PATTERNS: dict[str, type[Control]] = {
    "radial": Radial,
    "neighborhood-tiles": NeighborhoodTiles,
    "sliding-tile": SlidingTile,
    "draft": Draft,
}
"""What a plan chooses from, beside full attention: controls whose heads do not depend on each other."""


@dataclass(frozen=True)
class Pattern:
    """One of PATTERNS with its parameters, or FULL without any."""

    name: str
    params: tuple[tuple[str, Any], ...] = ()

    def make(self, **more: Any) -> Control:
        """The control. Raises ControlError for unknown names and for parameters that it has not."""
        if self.name not in PATTERNS:
            raise ControlError(f'a plan knows no pattern "{self.name}": it has {FULL}, {", ".join(PATTERNS)}.')
        try:
            return PATTERNS[self.name](**dict(self.params), **more)
        except TypeError as error:
            raise ControlError(f"pattern {self.name}: {error}.") from None


@dataclass(frozen=True)
class Choice:
    """What one head does in one layer and part of the run.

    pattern: its number in the plan. error: squared, relative to full attention's output. density: of what it visits.
    cost: its time as a share of full attention's.
    """

    pattern: int
    error: float
    density: float
    cost: float


@dataclass(frozen=True)
class SparsePlan:
    """Made by `pipelines.plan_sparse`, used by `Planned`.

    grid: of the latents for which it was made. phases: equal parts of the noise schedule. patterns: the first is full
    attention. sites: for each layer by name, for each phase, one choice per head.
    """

    grid: Grid
    phases: int
    patterns: tuple[Pattern, ...]
    sites: dict[str, tuple[tuple[Choice, ...], ...]]

    @property
    def choices(self) -> list[Choice]:
        """Every choice."""
        return [choice for phases in self.sites.values() for heads in phases for choice in heads]

    @property
    def predicted(self) -> dict[str, float]:
        """Means over all heads, layers and phases: error, density, and cost as a share of full attention's time."""
        every = self.choices
        return {name: sum(getattr(c, name) for c in every) / len(every) for name in ("error", "density", "cost")}

    def at(self, site: str, progress: float) -> tuple[Choice, ...]:
        """The choices of a layer's heads at a part of the run."""
        return self.sites[site][min(int(progress * self.phases), self.phases - 1)]

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON."""
        kept = {
            "format": FORMAT,
            "grid": self.grid,
            "phases": self.phases,
            "predicted": self.predicted,
            "patterns": [{"name": p.name, "params": dict(p.params)} for p in self.patterns],
            "sites": {
                name: [[[c.pattern, c.error, c.density, c.cost] for c in heads] for heads in phases]
                for name, phases in self.sites.items()
            },
        }
        Path(path).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SparsePlan:
        """Read what `save` wrote. Raises ControlError for files that are no plan."""
        if not Path(path).is_file():
            raise ControlError(f"there is no plan of sparse attention at {path}: make one with attnctrl plan-sparse.")
        try:
            kept = json.loads(Path(path).read_text(encoding="utf-8"))
            if kept["format"] != FORMAT:
                raise ValueError(f"its format is {kept['format']}, not {FORMAT}")
            patterns = tuple(Pattern(p["name"], tuple(p["params"].items())) for p in kept["patterns"])
            sites = {
                name: tuple(tuple(Choice(int(c[0]), *map(float, c[1:])) for c in heads) for heads in phases)
                for name, phases in kept["sites"].items()
            }
            frames, height, width = kept["grid"]
            return cls((frames, height, width), int(kept["phases"]), patterns, sites)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ControlError(f"{path} is no plan of sparse attention: {error}.") from None


def cheapest(tried: list[Choice], budget: float) -> Choice:
    """The choice of the least cost whose error is within the budget; full attention, the first, always is."""
    full = replace(tried[0], error=0.0)
    return min([full, *(c for c in tried[1:] if c.error <= budget)], key=lambda choice: choice.cost)
