"""Calibration of PAROAttention on any supported pipeline, from two short runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from attnctrl.controls.sparse.common import LATENTS
from attnctrl.controls.sparse.paro_calibration import ParoCalibration, Readings
from attnctrl.controls.sparse.paro_plan import ParoPlan
from attnctrl.errors import ControlError
from attnctrl.kernels.blocks_axis import BLOCK_SIZES
from attnctrl.run import control


def calibrate_paro(
    pipe: Any,
    draw: Callable[[], Any],
    density: float = 0.3,
    phases: int = 4,
    block: int = 64,
    alpha: float = 0.5,
    where: Any = LATENTS,
) -> ParoPlan:
    """The plan for `Paro`, from what `draw()` shows: it calls the pipeline, once or for several prompts, twice over.

    The first round chooses the order of the axes of each head, the second adds up, in each of `phases` equal parts of
    the run, which blocks of `block` tokens hold the attention; the share `density` above 0 to 1 of them is kept. Both
    compute full attention and all its probabilities in parts: slow, but once per model and size. Few steps are enough:
    each phase needs one.

    Raises:
        ControlError: a density, block or number of phases that cannot be, or a `draw` that does not call the pipeline.
    """
    if not 0 < density <= 1 or phases < 1 or block not in BLOCK_SIZES:
        raise ControlError(
            f"calibrate_paro(density={density}, phases={phases}, block={block}): give a density above 0 and at most 1, "
            f"one phase or more, and a block of {', '.join(map(str, BLOCK_SIZES))} tokens."
        )
    reading = ParoCalibration(block=block, phases=phases, alpha=alpha, where=where)
    orders = _read(pipe, draw, reading).orders()
    masks = replace(reading, orders=orders)
    return _read(pipe, draw, masks).plan(masks, density)


def _read(pipe: Any, draw: Callable[[], Any], reading: ParoCalibration) -> Readings:
    with control(pipe, reading, record=False) as run:
        draw()
    total = Readings()
    for sampling in run.samplings:
        for one in sampling.active:
            if one.control is reading:
                _add(total, one.state)
    if not total.grids:
        raise ControlError("calibrate_paro: draw() did not call the pipeline that is to be calibrated.")
    return total


def _add(total: Readings, more: Readings) -> None:
    for site, grid in more.grids.items():
        if total.grids.setdefault(site, grid) != grid:
            raise ControlError(
                f"calibrate_paro: draw() made latents of (frames, height, width) = {grid} and {total.grids[site]}: a "
                "plan is for one size."
            )
    for mine, others in ((total.costs, more.costs), (total.mass, more.mass)):
        for key, value in others.items():
            mine[key] = mine[key] + value if key in mine else value  # type: ignore[index]
