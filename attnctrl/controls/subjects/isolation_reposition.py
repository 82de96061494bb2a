"""IR-Diffusion: subjects of one picture do not see each other, and see their references moved to where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from attnctrl.control import Control, Where, param
from attnctrl.controls.subjects.owners import Owners, late_sites, watched_sites
from attnctrl.controls.subjects.rows import Look, References, placing, with_looks
from attnctrl.kernels import TokenGroups
from attnctrl.references import Subject
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Site, Stream


def moved(reference: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Which cells of a reference stand where, once its subject's bounding box is laid over the target's.

    reference, target: bool (height, width), where the subject is in each. Returns, for the cells of the target's
    bounding box row by row, the reference's nearest cells as indices, without those that are not the subject's: int64
    (cells,), with repeats where the subject grows; proportions are not kept. Empty where either mask is.
    """
    if not reference.any() or not target.any():
        return torch.zeros(0, dtype=torch.long, device=reference.device)
    lines = []
    for axis in (1, 0):
        ours, theirs = (mask.any(dim=axis).nonzero().flatten() for mask in (reference, target))
        (first, last), (start, end) = ((int(m[0]), int(m[-1])) for m in (ours, theirs))
        cells, into = end - start + 1, last - first + 1
        lines.append(first + torch.arange(cells, device=reference.device) * into // cells)
    rows, columns = lines
    index = (rows[:, None] * reference.shape[1] + columns).flatten()
    return index[reference.flatten()[index]]


def isolated(owned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups in which the latents of two subjects do not see each other, and all else is open.

    owned: bool (batch, subjects, tokens), at most one subject at each. -> membership of queries and of keys, bool
    (batch, tokens, subjects + 1), the last group for what is nobody's.
    """
    nobody = ~owned.any(dim=1, keepdim=True)
    keys = torch.cat([owned, nobody], dim=1)
    queries = torch.cat([owned | nobody, torch.ones_like(nobody)], dim=1)
    return queries.transpose(1, 2), keys.transpose(1, 2)


@dataclass
class State:
    rows: References
    owners: Owners
    names: frozenset[str]


@dataclass(frozen=True)
class IsolationReposition(Control):
    """IR-Diffusion (arXiv 2411.19261), after DreamStory (2407.12899): isolation, reposition and mutual attention.

    The run draws references along, given pictures by `DrawReferences` or, without it, portraits that the model makes
    of their prompts, as published. In all self-attention a latent of one subject does not see those of another
    (isolation, until `isolate_until`). From `from_layer` on, in the order of the forward pass, latents of a subject
    also see its reference, whose box is laid over the subject's (reposition); in each step a random `keep` of them
    does. In cross-attention `mutual` of what they get comes from the reference's prompt. Whose a latent is say the
    regions; without one, Otsu's threshold of the word's attention in the step before, refined by
    (S + S^2 + S^3 + S^4) / 4, and nobody's in the first step.
    Moving keys is moving what they are made of: a projection goes token by token, and where tokens have no positions
    of their own, as in UNets, repeats and gaps are all that the moving does. Departures: the code sums its powers of S
    into 12 rather than 1, which min-max scaling hides; overlaps belong to one subject. Families: UNets.
    """

    paper: ClassVar[str] = "arXiv 2411.19261"
    fixes: ClassVar[str] = "several subjects that blend, beside pictures or portraits of each"

    where: Where = field(default=Where(kinds=("self", "cross")), kw_only=True)
    branches: tuple[str, ...] = field(default=("cond", "uncond"), kw_only=True)
    subjects: Sequence[Subject] = ()
    placing: str = placing("bias")
    bias: float = param(0.0, "added to the logits of the references, with placing bias", -20, 20)
    from_layer: float = param(0.5, "share of the self-attention layers, in order, that see no reference", 0, 1)
    keep: float = param(0.5, "share of a subject's latents that see its reference, drawn in every step", 0, 1)
    isolate_until: float = param(1.0, "part of the run in which subjects do not see each other", 0, 1)
    mutual: float = param(0.9, "share of the text attention that is to the reference's prompt", 0, 1)
    seed: int = param(0, "of the draw of latents", 0, 2**31 - 1)

    @property
    def idle(self) -> bool:
        nothing = self.isolate_until == 0 and self.mutual == 0 and (self.keep == 0 or self.from_layer == 1)
        return self.window.empty or nothing or all(s.strength == 0 for s in self.subjects)

    def begin(self, sampling: Sampling) -> State:
        rows = References.of(sampling, self.subjects, self.name)
        owners = Owners.begin(sampling, self.subjects, rows.scenes, self.name, powers=(0.25,) * 4)
        selves = Where(("self",), self.where.blocks, self.where.near, self.where.max_tokens)
        names = frozenset(site.name for site in late_sites(sampling, selves, self.from_layer))
        return State(rows, owners, names)

    def sites(self, sampling: Sampling) -> list[Site]:
        return watched_sites(sampling, self.subjects, self.where.select(sampling.sites, sampling.latent_grid))

    def inputs(self, call: Call, state: State) -> Call:
        state.owners.watch(call)
        if call.queries.grid is None:
            return call
        owned = state.owners.at(call.queries.grid)
        if call.site.kind == "cross":
            return self._mutual(call, state, owned)
        if call.site.name not in state.names:
            return call
        grid, looks = call.queries.grid, []
        for i, number in state.rows.shown:
            index = state.rows.cells(number, grid, call.query.device)
            reference = torch.zeros(grid[1] * grid[2], dtype=torch.bool, device=call.query.device)
            reference[index] = True
            for p, mine in enumerate(owned[:, i]):
                where = moved(reference.view(grid[1:]), mine.view(grid[1:]))
                who = self._kept(mine, call.step.index, i)[None]
                strength = self.subjects[i].strength
                looks.append(Look(state.rows.row(number), where, who, slice(p, p + 1), self.bias, strength))
        return with_looks(call, looks, self.placing)

    def mask(self, call: Call, state: State) -> TokenGroups | None:
        if call.site.kind != "self" or call.step.progress >= self.isolate_until or call.queries.grid is None:
            return None
        owned = state.owners.at(call.queries.grid)
        if int(owned.any(dim=2).sum(dim=1).max()) < 2:
            return None
        shown = torch.tensor([s.strength > 0 for s in self.subjects], device=owned.device)[None, :, None]
        whole = torch.zeros(len(call.query), *owned.shape[1:], dtype=torch.bool, device=owned.device)
        whole[state.rows.pictures] = owned & shown
        return TokenGroups.from_members(*isolated(whole))

    def _kept(self, mine: torch.Tensor, step: int, number: int) -> torch.Tensor:
        """A random part of a subject's latents, all of them where none is left; the same in every layer of a grid."""
        if self.keep == 1:
            return mine
        generator = torch.Generator().manual_seed(hash((self.seed, step, number)) % 2**63)
        kept = mine & (torch.rand(len(mine), generator=generator) < self.keep).to(mine.device)
        return kept if bool(kept.any()) else mine & (self.keep > 0)

    def _mutual(self, call: Call, state: State, owned: torch.Tensor) -> Call:
        """Part of what a subject's latents get of text is of its reference's prompt."""
        firsts = dict(reversed(state.rows.shown))
        if not firsts or self.mutual == 0:
            return call
        rest = torch.ones(len(call.query), 1, call.query.shape[2], 1, device=call.query.device)
        pictures, streams = state.rows.pictures, []
        for i, number in firsts.items():
            weight = self.mutual * owned[:, i, None, :, None].to(rest)
            rest[pictures] -= weight
            row = state.rows.row(number)
            key, value = (t[row, None].expand(len(owned), -1, -1, -1) for t in (call.key, call.value))
            mask = call.mask if call.mask is None or len(call.mask) == 1 else call.mask[row, None]
            streams.append(Stream(key, value, weight.to(call.value.dtype), mask, rows=pictures))
        return call.shared(rest.to(call.value.dtype), *streams)
