"""MagicFace: pictures look at masked references, at first anywhere and then each subject's own part at its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from attnctrl.control import Control, Where, param
from attnctrl.controls.subjects.looking import Looking
from attnctrl.controls.subjects.owners import late_sites, watched_sites
from attnctrl.controls.subjects.rows import Look, placing, with_looks
from attnctrl.references import Subject
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Site


@dataclass(frozen=True)
class MagicFace(Control):
    """MagicFace (arXiv 2408.07433): reference-aware and region-grouped blend attention.

    The run draws references along, `DrawReferences`. From `from_layer` on, in the order of the forward pass, pictures
    see the keys of each reference inside its mask, `bias` added to their logits. Until `layout_until` every latent
    looks (RSA), but at subjects with a region those inside alone; later only the latents that are the subject's
    (RBA): by its region, else where its word, refined by (S + 3 S^2) / 4 as in the code, had most attention in the
    step before. Latents of nobody, references and the unconditional branch stay as they are. The paper adds 3 for one
    subject, 2 to 4 for several, and for several multiplies the other words by 0.6.
    Departures: the foreground is read in the conditional branch; guidance that differs from place to place is
    SemanticCFG's, which goes with this. References' noise: `DrawReferences(noise_kind="fresh")` is the code's.
    Families: UNets; in joint attention for subjects with regions, whose keys keep the positions of their reference.
    """

    paper: ClassVar[str] = "arXiv 2408.07433"
    fixes: ClassVar[str] = "subjects that do not look like their pictures, or like each other's"

    where: Where = field(default=Where(kinds=("self", "joint")), kw_only=True)
    subjects: Sequence[Subject] = ()
    placing: str = placing("bias")
    bias: float = param(3.0, "added to the logits of the references, with placing bias", -20, 20)
    layout_until: float = param(0.4, "part of the run in which every latent looks at every reference", 0, 1)
    from_layer: float = param(0.625, "share of the layers, in order, that are left alone", 0, 1)
    others: float = param(0.6, "what the maps of other words are multiplied by", 0.01, 1)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.from_layer == 1 or all(s.strength == 0 for s in self.subjects)

    def begin(self, sampling: Sampling) -> Looking:
        return Looking.begin(
            sampling, self.subjects, self.where, self.from_layer, self.name, powers=(0.25, 0.75), others=self.others
        )

    def sites(self, sampling: Sampling) -> list[Site]:
        return watched_sites(sampling, self.subjects, late_sites(sampling, self.where, self.from_layer))

    def inputs(self, call: Call, state: Looking) -> Call:
        state.owners.watch(call)
        if call.site.name not in state.names or call.queries.grid is None:
            return call
        grid, owned = call.queries.grid, state.owners.at(call.queries.grid)
        early = call.step.progress < self.layout_until
        looks = []
        for i, number in state.rows.shown:
            subject = self.subjects[i]
            who = owned[:, i] | True if early and subject.placed is None else owned[:, i]
            index = state.rows.cells(number, grid, call.query.device)
            looks.append(Look(state.rows.row(number), index, who, state.rows.pictures, self.bias, subject.strength))
        return with_looks(call, looks, self.placing)
