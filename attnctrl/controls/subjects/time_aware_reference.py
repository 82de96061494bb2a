"""CustomVideoX: how strongly pictures look at references goes with the step, and is higher where the subject is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from attnctrl.control import Control, Where, param
from attnctrl.controls.subjects.looking import Looking
from attnctrl.controls.subjects.owners import late_sites, watched_sites
from attnctrl.controls.subjects.rows import Look, with_looks
from attnctrl.references import Subject
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Site, Step


def parabola(step: Step, lowest: float, highest: float) -> float:
    """The weight of references in a step: `lowest` in the first and the last, `highest` in the middle.

    lowest + (highest - lowest) 4 s (1 - s), where s is the share of steps done, from 0 to 1; 0.5 in a run of one step.
    """
    done = step.index / (step.total - 1) if step.total > 1 else 0.5
    return lowest + (highest - lowest) * 4 * done * (1 - done)


@dataclass(frozen=True)
class TimeAwareReference(Control):
    """Time-aware and entity-region-aware attention biases (TAB, ERAE) of CustomVideoX (arXiv 2502.06527).

    The run draws references along, `DrawReferences`; their keys stand in one softmax with the picture's own, for all
    latents and not for text. TAB adds to the logits of references the logarithm of a weight that is a parabola over
    the steps: low at first, lest the reference be pasted, and at the end, where details form. ERAE adds
    `entity_bias` for latents of the subject: by its region, else where its word had most attention in the step before.
    The formulas are a reconstruction: the paper's own were not at hand, its prose gives the parabola, and neither the
    ends of it nor the entity's bias and threshold; Otsu's stands for the latter. The paper tunes a LoRA for
    references; their keys are those inside the mask. Families: UNets; in joint attention for subjects with regions,
    whose keys keep the positions of their reference.
    """

    paper: ClassVar[str] = "arXiv 2502.06527"
    fixes: ClassVar[str] = "references that are pasted, or fade while details form"

    where: Where = field(default=Where(kinds=("self", "joint")), kw_only=True)
    subjects: Sequence[Subject] = ()
    lowest: float = param(0.6, "weight of the references in the first and the last step; 0 hides them", 0, 20)
    highest: float = param(1.1, "weight of the references in the middle of the run", 0, 20)
    entity_bias: float = param(1.0, "added to the logits where the subject is", -20, 20)
    from_layer: float = param(0.0, "share of the layers, in order, that are left alone", 0, 1)

    @property
    def idle(self) -> bool:
        nothing = self.from_layer == 1 or (self.lowest == 0 and self.highest == 0)
        return self.window.empty or nothing or all(s.strength == 0 for s in self.subjects)

    def begin(self, sampling: Sampling) -> Looking:
        return Looking.begin(sampling, self.subjects, self.where, self.from_layer, self.name)

    def sites(self, sampling: Sampling) -> list[Site]:
        return watched_sites(sampling, self.subjects, late_sites(sampling, self.where, self.from_layer))

    def inputs(self, call: Call, state: Looking) -> Call:
        state.owners.watch(call)
        grid, weight = call.queries.grid, parabola(call.step, self.lowest, self.highest)
        if call.site.name not in state.names or grid is None or weight <= 0:
            return call
        owned, looks = state.owners.at(grid), []
        for i, number in state.rows.shown:
            index = state.rows.cells(number, grid, call.query.device)
            bias, strength = math.log(weight) + self.entity_bias * owned[:, i], self.subjects[i].strength
            looks.append(Look(state.rows.row(number), index, owned[:, i] | True, state.rows.pictures, bias, strength))
        return with_looks(call, looks, "bias")
