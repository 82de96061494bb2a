"""Sparse attention by a plan: each head by the pattern that a calibration chose for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from typing import ClassVar

import torch

from attnctrl.control import Control, Where, Window
from attnctrl.controls.sparse.common import BOTH, LATENTS, Sparse, falls_back
from attnctrl.controls.sparse.plan import FULL, SparsePlan
from attnctrl.errors import ControlError
from attnctrl.kernels import masked_attention
from attnctrl.sampling import Sampling
from attnctrl.sites import Call


class State(Sparse):
    """A run under a plan: the patterns as controls, each with a state of its own."""

    def __init__(self, control: Planned, sampling: Sampling, plan: SparsePlan) -> None:
        super().__init__(control, sampling)
        self.plan = plan
        if plan.grid != sampling.latent_grid:
            raise ControlError(
                f"the plan of sparse attention is for latents of (frames, height, width) = {plan.grid}, and this run's "
                f"are {sampling.latent_grid}: plan at this size."
            )
        missing = [s.name for s in control.where.select(sampling.sites, plan.grid) if s.name not in plan.sites]
        if missing:
            raise ControlError(
                f"the plan of sparse attention knows no layer {missing[0]}: it was made on another model, or at other "
                "sites (where)."
            )
        made = [None if p.name == FULL else p.make(fall_back=control.fall_back) for p in plan.patterns]
        self.patterns = [None if one is None else (one, one.begin(sampling)) for one in made]


def of_heads(call: Call, heads: torch.Tensor) -> Call:
    """The call of some heads only."""
    seen = call.seen
    if isinstance(seen, torch.Tensor) and seen.shape[1] > 1:
        seen = seen[:, heads]
    return call.change(query=call.query[:, heads], key=call.key[:, heads], value=call.value[:, heads], seen=seen)


@dataclass(frozen=True)
class Planned(Control):
    """Each head of each layer by the cheapest pattern within an error budget, as `attnctrl plan-sparse` found them.

    plan: a `SparsePlan` or its file, from `pipelines.plan_sparse`. The heads that share a pattern are computed
    together; those with full attention by the fused kernel. The idea of a choice per head from a short calibration is
    MInference's (arXiv 2407.02490) and Sparse VideoGen's (2502.01776), with the patterns of this package.
    Families: all with self- or joint attention among latents, at the size that was calibrated.
    """

    paper: ClassVar[str] = "after arXiv 2407.02490 and arXiv 2502.01776"
    fixes: ClassVar[str] = "slow video generation"

    plan: SparsePlan | str | PathLike[str] = field(default="", metadata={"help": "file of attnctrl plan-sparse"})
    fall_back: bool = falls_back()
    window: Window = field(default=Window(), kw_only=True)
    where: Where = field(default=LATENTS, kw_only=True)
    branches: tuple[str, ...] = field(default=BOTH, kw_only=True)

    def begin(self, sampling: Sampling) -> State:
        return State(self, sampling, self.plan if isinstance(self.plan, SparsePlan) else SparsePlan.load(self.plan))

    def attend(self, call: Call, state: State) -> torch.Tensor | None:
        choices = state.plan.at(call.site.name, call.step.progress)
        if len(choices) != call.query.shape[1]:
            raise ControlError(
                f"the plan of sparse attention is for {len(choices)} heads at {call.site.name}, which has "
                f"{call.query.shape[1]}: it was made on another model."
            )
        numbers = torch.tensor([choice.pattern for choice in choices])
        if not numbers.any():
            return None
        key, parts, share = (call.site.name, call.step.index, call.branch), [], 0.0
        for number in numbers.unique().tolist():
            heads = (numbers == number).nonzero().flatten().to(call.query.device)
            some, made = of_heads(call, heads), state.patterns[number]
            result = None if made is None else made[0].attend(some, made[1])
            parts.append((heads, some, result))
            share += len(heads) / len(choices) * (1.0 if result is None else float(state.report.visits[key].share))
        if all(result is None for _, _, result in parts):
            state.visited(call, 1.0, "full", state.report.visits[key].why)
            return None
        output = torch.empty_like(call.query)
        for heads, some, result in parts:
            if result is None:
                result = masked_attention(some.query, some.key, some.value, some.seen, call.scale)
            output[:, heads] = result
        state.visited(call, share, "planned")
        return output
