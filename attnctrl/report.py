"""What acted where, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Acted:
    """The work of one control at one point: at which sites, in which steps, how often, for how many host seconds."""

    control: str
    point: str
    sites: set[str] = field(default_factory=set)
    steps: set[int] = field(default_factory=set)
    calls: int = 0
    seconds: float = 0.0


@dataclass
class Report:
    """One row per control and point. On a GPU the seconds are those of the host, kernels run on beyond them."""

    rows: dict[tuple[int, str], Acted] = field(default_factory=dict)

    @contextmanager
    def timed(self, index: int, control: str, point: str, step: int, site: str | None = None) -> Iterator[None]:
        """Account for one act of control number `index` of the run."""
        start = time.perf_counter()
        yield
        self.add(index, control, point, step, site, time.perf_counter() - start)

    def add(self, index: int, control: str, point: str, step: int, site: str | None, seconds: float) -> None:
        row = self.rows.setdefault((index, point), Acted(control, point))
        row.calls += 1
        row.seconds += seconds
        row.steps.add(step)
        if site is not None:
            row.sites.add(site)

    def acted(self, index: int) -> bool:
        """Whether control number `index` acted at all."""
        return any(i == index for i, _ in self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "no control acted"
        lines = [f"{'control':<18}{'point':<9}{'sites':>6}{'steps':>9}{'calls':>7}{'seconds':>9}"]
        for row in self.rows.values():
            span = f"{min(row.steps)}-{max(row.steps)}"
            sites = str(len(row.sites)) if row.sites else "-"
            lines.append(f"{row.control:<18}{row.point:<9}{sites:>6}{span:>9}{row.calls:>7}{row.seconds:>9.3f}")
        return "\n".join(lines)
