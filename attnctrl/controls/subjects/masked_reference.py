"""DreamVideo-2: what a picture gets of a reference is gated by a blended mask of where its subject belongs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from attnctrl.control import Control, Where, param
from attnctrl.controls.subjects.looking import Looking
from attnctrl.controls.subjects.owners import late_sites, watched_sites
from attnctrl.controls.subjects.rows import Look, with_looks
from attnctrl.references import Subject
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Site


def blended(mask: torch.Tensor, outside: float) -> torch.Tensor:
    """The gate M^ = M + outside (1 - M) of a bool mask M: float of the same shape, 1 inside."""
    inside = mask.float()
    return inside + outside * (1 - inside)


@dataclass(frozen=True)
class MaskedReference(Control):
    """Masked reference attention of DreamVideo-2 (Wei et al., arXiv 2410.13830).

    The run draws references along, `DrawReferences`. Beside its own attention a picture attends to each reference, in
    a softmax of its own in which no query is masked; the result is multiplied by M + `outside` (1 - M), M being 1 where
    the subject belongs: by its region, else where its word had most attention in the step before. `outside` 1 is no
    gate; 0 is a hard box, with the best places and artefacts in the background; the paper has 0.75 for a subject.
    Departures: the paper adds the gated attention through projections that it trains, after self- and cross-attention;
    without them it acts in self-attention, and the sum is divided by its weights, 1 for the picture's own attention
    and the gates times the strengths. The keys of a reference are those inside its mask, where the paper
    blanks the ground. Families: UNets; in joint attention for subjects with regions, whose keys keep the positions of
    their reference.
    """

    paper: ClassVar[str] = "arXiv 2410.13830"
    fixes: ClassVar[str] = "a subject's look that spreads over the ground, or stays away from its box"

    where: Where = field(default=Where(kinds=("self", "joint")), kw_only=True)
    subjects: Sequence[Subject] = ()
    outside: float = param(0.75, "share of the reference attention that is left outside the subject's place", 0, 1)
    from_layer: float = param(0.0, "share of the layers, in order, that are left alone", 0, 1)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.from_layer == 1 or all(s.strength == 0 for s in self.subjects)

    def begin(self, sampling: Sampling) -> Looking:
        return Looking.begin(sampling, self.subjects, self.where, self.from_layer, self.name)

    def sites(self, sampling: Sampling) -> list[Site]:
        return watched_sites(sampling, self.subjects, late_sites(sampling, self.where, self.from_layer))

    def inputs(self, call: Call, state: Looking) -> Call:
        state.owners.watch(call)
        grid = call.queries.grid
        if call.site.name not in state.names or grid is None:
            return call
        owned, looks = state.owners.at(grid), []
        for i, number in state.rows.shown:
            index = state.rows.cells(number, grid, call.query.device)
            gate, strength = blended(owned[:, i], self.outside), self.subjects[i].strength
            looks.append(Look(state.rows.row(number), index, gate, state.rows.pictures, strength=strength))
        return with_looks(call, looks, "gate")
