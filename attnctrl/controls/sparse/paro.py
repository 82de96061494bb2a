"""PAROAttention: each head's tokens in the axis order that suits it, static masks from a calibration, 8 bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Where, Window, param
from attnctrl.controls.sparse.common import BOTH, LATENTS, Sequence, Sparse, falls_back
from attnctrl.controls.sparse.paro_plan import ParoPlan, SitePlan, axis_orders
from attnctrl.errors import ControlError
from attnctrl.kernels import BlockAxis, TokenOrder
from attnctrl.sampling import Sampling
from attnctrl.sites import Call


class _Planned(Sparse):
    """A run under a plan, its bits on the run's device."""

    def __init__(self, control: Paro, sampling: Sampling, plan: ParoPlan) -> None:
        super().__init__(control, sampling)
        self.plan = plan
        for site in control.where.select(sampling.sites, sampling.latent_grid):
            found, grid = plan.sites.get(site.name), site.grid(sampling.latent_grid)
            if found is None:
                raise ControlError(
                    f"the PAROAttention plan knows no layer {site.name}: it was calibrated on another model, or at "
                    "other sites (where)."
                )
            if found.grid != grid:
                raise ControlError(
                    f"the PAROAttention plan is for latents of (frames, height, width) = {found.grid} at {site.name}, "
                    f"and this run's are {grid}: calibrate at this size."
                )

    def site(self, name: str, device: torch.device) -> SitePlan:
        def here() -> SitePlan:
            plan = self.plan.sites[name]
            masks = {phase: bits.to(device) for phase, bits in plan.masks.items()}
            return SitePlan(plan.grid, plan.order.to(device), masks)

        return self.once((name, device), here)


@dataclass(frozen=True)
class Paro(Control):
    """PAROAttention (arXiv 2506.16054): an order of the axes per head, under which attention falls into few blocks.

    plan: a `ParoPlan` or its file, from `pipelines.calibrate_paro`. Each head lays its latents out in one of the six
    orders of frames, height and width, visits the blocks that its masks keep in this part of the run, the same in both
    guidance branches, and puts the tokens back. int8: query and key in 8 bits, rounded per block after the reordering,
    which makes blocks alike; forward only.

    Departures: text has blocks of its own, where in the official code it runs into the first ones of the video; the
    softmax runs over what is visited, as in the official kernel, not its simulator. `empty` heads are not skipped: the
    official runtime ignores them.
    Families: all with self- or joint attention among latents, at the size that was calibrated.
    """

    paper: ClassVar[str] = "arXiv 2506.16054"
    fixes: ClassVar[str] = "slow video generation"

    plan: ParoPlan | str | PathLike[str] = field(default="", metadata={"help": "file of calibrate_paro"})
    int8: bool = param(False, "query and key in 8 bits")
    fall_back: bool = falls_back()
    window: Window = field(default=Window(), kw_only=True)
    where: Where = field(default=LATENTS, kw_only=True)
    branches: tuple[str, ...] = field(default=BOTH, kw_only=True)

    def conflict(self, other: Control) -> str | None:
        if self.int8 and {"loss", "noise"} & set(other.points()) and not other.idle:
            return "attention in 8 bits has no gradients, which the other takes: set int8=False."
        return None

    def begin(self, sampling: Sampling) -> _Planned:
        return _Planned(self, sampling, self.plan if isinstance(self.plan, ParoPlan) else ParoPlan.load(self.plan))

    def attend(self, call: Call, state: Any) -> torch.Tensor | None:
        sequence, device = Sequence.of(call, self.name), call.query.device
        site, plan = state.site(call.site.name, device), state.plan
        if len(site.order) != call.query.shape[1]:
            raise ControlError(
                f"the PAROAttention plan is for {len(site.order)} heads at {call.site.name}, which has "
                f"{call.query.shape[1]}: it was calibrated on another model."
            )
        axis = BlockAxis((sequence.latents,), plan.block)
        visited = site.visited(int(call.step.progress * plan.phases), axis.blocks)
        mask = sequence.chosen(axis, visited[None], plan.density)
        six = state.once((sequence, device), lambda: sequence.order(axis_orders(sequence.grid).to(device)))
        order = TokenOrder(six.order[site.order], six.inverse[site.order])
        return state.attend(call, mask, self.fall_back, order, form="int8" if self.int8 else None)
