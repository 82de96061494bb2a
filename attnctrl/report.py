"""What acted where, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Acted:
    """The work of one control at one point: at which sites, in which steps, how often, for how many host seconds."""

    control: str
    point: str
    sites: set[str] = field(default_factory=set)
    steps: set[int] = field(default_factory=set)
    calls: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Visit:
    """One call of an attention that may skip pairs of query and key.

    share: of the pairs, what was visited; a tensor of one number where it is read later, lest a GPU be waited for.
    form: what computed it. why: why nothing was skipped; empty where something was.
    """

    control: str
    share: float | torch.Tensor
    form: str
    why: str = ""


@dataclass
class Report:
    """One row per control and point. On a GPU the seconds are those of the host, kernels run on beyond them.

    visits: what sparse attention visited, by site, step and guidance branch.
    """

    rows: dict[tuple[int, str], Acted] = field(default_factory=dict)
    visits: dict[tuple[str, int, str], Visit] = field(default_factory=dict)

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

    def visit(
        self, at: tuple[str, int, str], control: str, share: float | torch.Tensor, form: str, why: str = ""
    ) -> None:
        """Account for one call of sparse attention, at (site, step, branch); a call made again counts once."""
        self.visits[at] = Visit(control, share, form, why)

    def visited(self) -> float:
        """The mean share of pairs that sparse attention visited in the calls in which its control acted; 1 is all."""
        shares = [float(visit.share) for visit in self.visits.values()]
        return sum(shares) / len(shares) if shares else 1.0

    def sparse_lines(self) -> list[str]:
        """What sparse attention visited, a sentence per control and way of computing it."""
        kinds: dict[tuple[str, str], list[float]] = {}
        for visit in self.visits.values():
            how = f"skipped nothing: {visit.why}" if visit.why else f"by {visit.form}"
            kinds.setdefault((visit.control, how), []).append(float(visit.share))
        return [
            f"{control}: {len(shares)} calls visited {100 * sum(shares) / len(shares):.1f}% of the pairs, {how}"
            for (control, how), shares in kinds.items()
        ]

    def __str__(self) -> str:
        if not self.rows:
            return "\n".join(["no control acted", *self.sparse_lines()])
        lines = [f"{'control':<18}{'point':<9}{'sites':>6}{'steps':>9}{'calls':>7}{'seconds':>9}"]
        for row in self.rows.values():
            span = f"{min(row.steps)}-{max(row.steps)}"
            sites = str(len(row.sites)) if row.sites else "-"
            lines.append(f"{row.control:<18}{row.point:<9}{sites:>6}{span:>9}{row.calls:>7}{row.seconds:>9.3f}")
        return "\n".join([*lines, *self.sparse_lines()])
