"""A plan of sparse attention on any supported pipeline, from a short run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attnctrl.controls.sparse.plan import FULL, Pattern, SparsePlan
from attnctrl.controls.sparse.probing import SparseProbe
from attnctrl.errors import ControlError
from attnctrl.run import control

DENSITIES = (0.5, 0.3, 0.2, 0.1)


def usual_patterns(block: int) -> tuple[Pattern, ...]:
    """What is tried by default: tiles and drafts at four densities, and Radial's bands."""
    given = ("block", block)
    tiles = [Pattern(n, (("density", d), given)) for n in ("neighborhood-tiles", "draft") for d in DENSITIES]
    bands = [Pattern("radial", (("decay", decay), given)) for decay in (0.95, 0.2)]
    return *tiles, *bands


def plan_sparse(
    pipe: Any,
    draw: Callable[[], Any],
    budget: float = 0.02,
    phases: int = 4,
    block: int = 128,
    patterns: Sequence[Pattern] = (),
) -> SparsePlan:
    """The cheapest pattern within an error budget for every layer, part of the run and head.

    draw: calls the pipeline, with few steps, at the size that is to be planned for. budget: the largest squared error
    of a head's output, relative to full attention's. phases: equal parts of the run, planned apart. block: tokens per
    block of the usual patterns. patterns: what is tried instead of those. The run computes every pattern beside full
    attention, and times both.

    Raises:
        ControlError: numbers that cannot be, unknown patterns, or a `draw` that does not call the pipeline.
    """
    if not budget >= 0 or phases < 1:
        raise ControlError(f"plan_sparse(budget={budget}, phases={phases}): give 0 or more, and one phase or more.")
    every = (Pattern(FULL), *(patterns or usual_patterns(block)))
    for pattern in every[1:]:
        pattern.make()
    probe = SparseProbe(patterns=every, phases=phases)
    with control(pipe, probe, record=False):
        draw()
    if not probe.readings.full:
        raise ControlError("plan_sparse: draw() did not call the pipeline that is to be planned for.")
    return probe.readings.plan(every, phases, budget)
