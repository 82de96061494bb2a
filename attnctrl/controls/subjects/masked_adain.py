"""Cross-image attention's AdaIN: the latents of a subject get the statistics of its noised reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from attnctrl.control import Control, Where, param
from attnctrl.controls.subjects.owners import Owners, in_or_before, watched_sites
from attnctrl.controls.subjects.rows import References
from attnctrl.references import Subject
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Site, Step

EPSILON = 1e-5
"""Added to variances, as in the code."""


def adain(target: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Adaptive instance normalisation: (channels, tokens) with this mean and variance, (channels,), over the tokens."""
    own, spread = target.mean(dim=1, keepdim=True), target.var(dim=1, unbiased=False, keepdim=True) + EPSILON
    return (target - own) * ((variance[:, None] + EPSILON) / spread).sqrt() + mean[:, None]


@dataclass
class State:
    """clean: the references' latents, (references, channels, height, width), from the first step on."""

    rows: References
    owners: Owners
    sampling: Sampling
    clean: torch.Tensor | None = None


@dataclass(frozen=True)
class MaskedAdaIN(Control):
    """Masked AdaIN of the latents, from Cross-Image Attention (Alaluf et al., arXiv 2311.03335).

    After a step the latents of a subject are given, channel by channel, the mean and the variance that its reference
    would have there at the same noise; so what attention does not carry over, as the overall colour, comes from the
    latents themselves. Its latents are those that its reference covers, moved to its region; without a region, or where
    the reference is not moved, the region itself or where its word had most attention in the step before. Of several
    references of a subject each has its share. No attention is changed: other methods for subjects go with this one.
    Departures: the paper has noise from an inversion, where the noise's own mean is 0 and its variance the schedule's
    here; masks by clustering self-attention; and, beside this, keys and values of the appearance, for which there are
    MagicFace and others, contrasted attention and guidance by appearance. It starts at 0.2 of the run, where this acts
    in all steps. By itself it needs no rows of references in the run: prompt=[picture, ...].
    Families: all for pictures, those without cross-attention for subjects with regions.
    """

    paper: ClassVar[str] = "arXiv 2311.03335"
    fixes: ClassVar[str] = "a subject of the wrong colour, where attention to its picture does not carry colour over"
    needs_rows: ClassVar[bool] = False

    where: Where = field(default=Where(kinds=("cross", "self", "joint")), kw_only=True)
    subjects: Sequence[Subject] = ()
    share: float = param(1.0, "how far the latents go towards these statistics", 0, 1)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.share == 0 or all(s.strength == 0 for s in self.subjects)

    def begin(self, sampling: Sampling) -> State:
        rows = References.of(sampling, self.subjects, self.name, needed=False)
        return State(rows, Owners.begin(sampling, self.subjects, rows.scenes, self.name), sampling)

    def acts(self, step: Step, branch: str, state: State) -> bool:
        return branch in self.branches and in_or_before(self.window, step)

    def sites(self, sampling: Sampling) -> list[Site]:
        return watched_sites(sampling, self.subjects, [])

    def inputs(self, call: Call, state: State) -> Call:
        state.owners.watch(call)
        return call

    def latents(self, latents: torch.Tensor, step: Step, state: State) -> torch.Tensor:
        rows, (height, width) = state.rows, latents.shape[-2:]
        first = rows.pictures.stop
        if state.clean is None:
            pictures = [one.fitted(height, width).picture for _, one in rows.all]
            like = latents[:1].expand(len(pictures), *latents.shape[1:])
            assert state.sampling.clean is not None
            state.clean = state.sampling.clean(pictures, like).float()
        assert state.sampling.noised_next is not None
        expected = state.sampling.noised_next(state.clean, torch.zeros_like(state.clean), step)
        noise = float(state.sampling.noised_next(torch.zeros(1), torch.ones(1), step))
        owned, changed = state.owners.at((1, height, width)), latents.clone()
        moved = torch.zeros_like(changed, dtype=torch.float32)
        for i, number in rows.shown:
            subject, cells = self.subjects[i], rows.cells(number, (1, height, width), latents.device)
            given = expected[number].flatten(1)[:, cells]
            mean, variance = given.mean(dim=1), given.var(dim=1, unbiased=False) + noise**2
            part = self.share * min(subject.strength, 1.0) / len(subject.references)
            follows = subject.placed is not None and subject.reposition
            for row in range(first):
                where = cells if follows else owned[row, i].nonzero().flatten()
                if len(where):
                    own = latents[row].float().flatten(1)[:, where]
                    moved[row].flatten(1)[:, where] += part * (adain(own, mean, variance) - own)
        return changed + moved.to(changed)
