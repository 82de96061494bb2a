"""ConsiStory: the pictures of a set see the subjects of a few of them, so that these look alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from attnctrl.control import Control, Where, Window, param
from attnctrl.controls.subjects.owners import Named, Owners, in_or_before, watched_sites
from attnctrl.controls.subjects.rows import References, looks_of_all, placing, random_part, with_looks
from attnctrl.errors import ControlError
from attnctrl.references import Subject
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Site, Step


@dataclass
class State:
    """names: the phrases whose latents are shown. chosen: the names of the layers that share."""

    rows: References
    owners: Owners
    names: list[Named]
    chosen: frozenset[str]


@dataclass(frozen=True)
class SharedAttention(Control):
    """Subject-driven self-attention of ConsiStory (Tewel et al., arXiv 2402.03286).

    The run draws several pictures: prompt=[picture, ...]. In the decoder's self-attention every picture sees its own
    keys and, of the first `anchors` pictures, those of the `phrases`: where their attention in the step before is
    above Otsu's threshold. A random `keep` of these is shown, drawn in every step. Given references, whose rows stand
    after the pictures, are shown to all, inside their masks, as further anchors. One mask serves all subjects of a
    picture, so two of them may blend. Each branch sees its own keys, from the second step on.
    Departures: the published layout diversity (queries of a run without sharing) and the second run that injects
    features are left out. Families: UNets; in joint attention with references alone, whose keys keep their positions.
    """

    paper: ClassVar[str] = "arXiv 2402.03286"
    fixes: ClassVar[str] = "a subject that looks different in every picture of a set"

    window: Window = field(default=Window(0.02, 1.0), kw_only=True)
    where: Where = field(default=Where(kinds=("self", "joint"), blocks=("up", "")), kw_only=True)
    branches: tuple[str, ...] = field(default=("cond", "uncond"), kw_only=True)
    subjects: Sequence[Subject] = ()
    phrases: Sequence[str] = field(default=(), kw_only=True)
    placing: str = placing("bias")
    anchors: int = param(2, "how many of the pictures the others look at", 0, 64)
    keep: float = param(0.5, "share of the anchors' latents that is shown", 0, 1)
    seed: int = param(0, "of the draw of latents", 0, 2**31 - 1)

    @property
    def idle(self) -> bool:
        shown = any(s.strength > 0 for s in self.subjects) or (self.phrases and self.anchors > 0)
        return self.window.empty or self.keep == 0 or not shown

    def begin(self, sampling: Sampling) -> State:
        if isinstance(self.phrases, str) or not all(isinstance(p, str) for p in self.phrases):
            raise ControlError("SharedAttention takes one list of phrases for all pictures: phrases=[phrase, ...].")
        rows = References.of(sampling, self.subjects, self.name)
        names = [Named(phrase) for phrase in self.phrases]
        owners = Owners.begin(sampling, names, rows.scenes, self.name)
        chosen = frozenset(site.name for site in self.where.select(sampling.sites, sampling.latent_grid))
        return State(rows, owners, names, chosen)

    def acts(self, step: Step, branch: str, state: State) -> bool:
        return branch in self.branches and in_or_before(self.window, step)

    def sites(self, sampling: Sampling) -> list[Site]:
        names = [Named(phrase) for phrase in self.phrases]
        return watched_sites(sampling, names, self.where.select(sampling.sites, sampling.latent_grid))

    def inputs(self, call: Call, state: State) -> Call:
        state.owners.watch(call)
        grid, step = call.queries.grid, call.step
        if call.site.name not in state.chosen or grid is None or step.progress not in self.window:
            return call
        pictures, sources = state.rows.pictures, []
        for row, mine in enumerate(state.owners.at(grid).any(dim=1)[: self.anchors]):
            sources.append((row, random_part(mine.nonzero().flatten(), self.keep, (self.seed, step.index, row)), 1.0))
        for i, number in state.rows.shown:
            row = state.rows.row(number)
            index = state.rows.cells(number, grid, call.query.device)
            part = random_part(index, self.keep, (self.seed, step.index, row))
            sources.append((row, part, self.subjects[i].strength))
        return with_looks(call, looks_of_all(sources, pictures, call), self.placing)
