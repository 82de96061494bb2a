"""DreamMatcher: where a picture's latents match those of a reference, they get the reference's values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from attnctrl.control import Control, Where, Window, param
from attnctrl.controls.subjects.owners import Owners, in_or_before, late_sites, watched_sites
from attnctrl.controls.subjects.rows import References
from attnctrl.references import Subject
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid, Site, Step

CHUNK = 1024
"""Latents matched at a time, so that no array is latents x latents."""


def nearest(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """For each query the key of the largest cosine: (n, channels), (m, channels) -> int64 (n,)."""
    queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
    return torch.cat([(part @ keys.T).argmax(dim=-1) for part in queries.split(CHUNK)])


def cycle_error(there: torch.Tensor, back: torch.Tensor, width: int) -> torch.Tensor:
    """How far from each latent the match of its match lies, in cells: float (n,) (eq. 6 of the paper).

    there: for each target latent its match in the reference; back: the reverse. width: of the grid.
    """
    start = torch.arange(len(there), device=there.device)
    end = back[there]
    rows, columns = end // width - start // width, end % width - start % width
    return torch.hypot(rows.float(), columns.float())


def principal(target: torch.Tensor, reference: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both (tokens, channels) on their common principal components, at most so many."""
    both = torch.cat([target, reference])
    both = both - both.mean(dim=0)
    if both.shape[1] > most:
        axes = torch.linalg.eigh(both.T @ both).eigenvectors[:, -most:]
        both = both @ axes
    return both[: len(target)], both[len(target) :]


@dataclass
class State:
    """now, before: by branch, and by grid of the decoder's layers, the keys of the last of them, (rows, tokens,
    channels), in this step and in the step before. matched: by branch, row and reference what the latents match."""

    rows: References
    owners: Owners
    names: frozenset[str]
    step: int = -1
    now: dict[tuple[str, Grid], torch.Tensor] = field(default_factory=dict)
    before: dict[tuple[str, Grid], torch.Tensor] = field(default_factory=dict)
    matched: dict[tuple[str, Grid, int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def turn(self, step: int) -> None:
        if step != self.step:
            self.step, self.before, self.now = step, self.now, {}
            self.matched.clear()

    def features(self, branch: str, grid: Grid, row: int) -> torch.Tensor | None:
        """Features of one row on a grid, (tokens, channels), of unit length each per layer."""
        found = []
        for (where, its), rows in self.before.items():
            if where == branch:
                sized = rows[row].T.unflatten(1, its[1:])[None]
                sized = F.interpolate(sized, size=grid[1:], mode="bilinear", align_corners=False)
                found.append(sized[0].flatten(1).T)
        return torch.cat(found, dim=1) if found else None


@dataclass(frozen=True)
class AppearanceMatching(Control):
    """Appearance matching self-attention of DreamMatcher (Nam et al., arXiv 2402.09812).

    The run draws references along, `DrawReferences` (the paper inverts them). In the self-attention of the last layers,
    from `from_layer` on in the order of the forward pass, the values of a subject's latents become those that its
    reference has at their matches; queries and keys, and with them the structure, stay (eq. 4). A latent's match is the
    one of the nearest features in the step before; it counts where the way there and back ends within `threshold`
    times the grid's height times the share of the picture that the subject takes (eq. 6, 7). Both branches match their
    own features. Whose a latent is say the regions, else Otsu's threshold of its word's attention in the step before,
    which keeps several subjects apart.
    Departures: the features are the keys of the decoder's self-attention, joined over its grids and reduced to 256
    principal components, where the paper has outputs of its blocks; masks are hard, as in the paper, where the code
    blends by soft ones; matches outside of the reference's mask do not count; the semantic matching guidance, off in
    the code, is left out. The paper's models know the subject already. Families: UNets.
    """

    paper: ClassVar[str] = "arXiv 2402.09812"
    fixes: ClassVar[str] = "details of a subject's look, its structure kept"

    window: Window = field(default=Window(0.08, 1.0), kw_only=True)
    where: Where = field(default=Where(kinds=("self",)), kw_only=True)
    branches: tuple[str, ...] = field(default=("cond", "uncond"), kw_only=True)
    subjects: Sequence[Subject] = ()
    threshold: float = param(0.4, "cycle error that passes, in sides of the subject's share of the grid", 0, 4)
    from_layer: float = param(0.625, "share of the layers, in order, that are left alone", 0, 1)

    @property
    def idle(self) -> bool:
        nothing = self.threshold == 0 or self.from_layer == 1
        return self.window.empty or nothing or all(s.strength == 0 for s in self.subjects)

    def begin(self, sampling: Sampling) -> State:
        rows = References.of(sampling, self.subjects, self.name)
        owners = Owners.begin(sampling, self.subjects, rows.scenes, self.name)
        names = frozenset(site.name for site in late_sites(sampling, self.where, self.from_layer))
        return State(rows, owners, names)

    def acts(self, step: Step, branch: str, state: State) -> bool:
        return branch in self.branches and in_or_before(self.window, step)

    def sites(self, sampling: Sampling) -> list[Site]:
        return watched_sites(sampling, self.subjects, late_sites(sampling, self.where, self.from_layer))

    def inputs(self, call: Call, state: State) -> Call:
        state.owners.watch(call)
        state.turn(call.step.index)
        grid = call.queries.grid
        if call.site.name not in state.names or grid is None:
            return call
        state.now[call.branch, grid] = F.normalize(call.key.transpose(1, 2).flatten(2).float(), dim=-1)
        if not state.before or call.step.progress not in self.window:
            return call
        value, owned = call.value.clone(), state.owners.at(grid)
        for row in range(state.rows.pictures.stop):
            for i, number in state.rows.shown:
                mine = owned[row, i]
                if not mine.any():
                    continue
                there, error = self._matched(call, state, grid, row, number)
                shown = torch.zeros_like(mine)
                shown[state.rows.cells(number, grid, mine.device)] = True
                sure = mine & shown[there] & (error < self.threshold * grid[1] * float(mine.float().mean()))
                share = min(self.subjects[i].strength, 1.0) * sure[None, :, None].to(value.dtype)
                warped = call.value[state.rows.row(number)][:, there]
                value[row] = torch.where(sure[None, :, None], value[row] + share * (warped - value[row]), value[row])
        return call.change(value=value)

    def _matched(
        self, call: Call, state: State, grid: Grid, row: int, number: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the latents of a picture match in a reference, and their cycle error; found once per step and grid."""
        key = call.branch, grid, row, number
        if key not in state.matched:
            features = [state.features(call.branch, grid, r) for r in (row, state.rows.row(number))]
            assert features[0] is not None
            assert features[1] is not None
            target, reference = principal(features[0], features[1], 256)
            there, back = nearest(target, reference), nearest(reference, target)
            state.matched[key] = there, cycle_error(there, back, grid[2])
        return state.matched[key]
