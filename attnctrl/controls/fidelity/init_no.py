"""InitNO: begin with a noise in which every subject is attended to, apart from the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from attnctrl.control import Control, Descent, Loss, Where, Window, param
from attnctrl.controls.fidelity.attend_excite import excited_maps, neglect
from attnctrl.controls.fidelity.conflict_scores import overlap, scatter, subject_rows
from attnctrl.controls.fidelity.descents import refined, step_size
from attnctrl.controls.fidelity.noise_search import search
from attnctrl.errors import ControlError
from attnctrl.pairs import named, resolve_subjects
from attnctrl.sampling import Sampling
from attnctrl.sites import Step
from attnctrl.stepmaps import StepMaps
from attnctrl.subjects import Phrases, Subjects

ENOUGH_CROSS, ENOUGH_SELF = 0.2, 0.3
"""Scores at which a noise, or a refinement, is good enough."""

LIMIT = 1e-3
DECAY = 0.9
REFINED = (0.2, 0.4)


@dataclass
class Tracks:
    """average: the subjects' maps over the steps done, decaying by 0.9."""

    subjects: Subjects
    average: torch.Tensor | None = None
    latest: torch.Tensor | None = None
    step: int = -1

    def exchange(self, step: Step, found: torch.Tensor) -> torch.Tensor:
        """The average over the steps before, these maps themselves in the first."""
        if step.index != self.step and self.latest is not None:
            before = self.latest if self.average is None else self.average
            self.average = DECAY * before + (1 - DECAY) * self.latest
        self.step, self.latest = step.index, found.detach()
        return self.latest if self.average is None else self.average


def check_start(control: Control, sampling: Sampling) -> None:
    """Raise ControlError where the sampling does not begin with noise."""
    if sampling.step is not None and 0 < sampling.step.progress in control.window:
        raise ControlError(
            f"{control.name} searches for a start noise, but the run begins with a picture at "
            f"{sampling.step.progress:.2f} of the noise schedule: set rounds=0, or begin with noise."
        )


@dataclass(frozen=True)
class InitNO(Control):
    """InitNO: Boosting Text-to-Image Diffusion Models via Initial Noise Optimization (Guo et al., CVPR 2024).

    Noise: the mean and variance of each element are learned (see `search`) under S_cross + S_self (where S_cross is at
    most 0.5) + the clean loss, until S_cross < 0.2 and S_self < 0.3, with the divergence from N(0, 1) at most 0.001.
    Then, in the first half of the run, Attend-and-Excite's descent of S_cross, with at most `refinements` further
    descents at 20 and 40 percent of S_cross + 0.1 clean + 0.1 align + S_self, align being the distance to the decaying
    average of the maps of earlier steps. Departures from the official code: fresh noise follows from the picture's own
    seed; the noise with the lowest loss is taken, not the last one; where a refinement runs out of descents its last
    one is of the joint loss. In joint attention S_self is of the latents among themselves.
    phrases are the subjects; by default every noun of the prompt. Families: all (SANA: self_weight=0).
    """

    paper: ClassVar[str] = "arXiv 2404.04650"
    fixes: ClassVar[str] = "a named subject is missing, two subjects melted together"

    phrases: Phrases | None = None
    rounds: int = param(5, "noises tried; 0 keeps the given one", 0, 50)
    iterations: int = param(10, "steps per noise", 0, 100)
    rate: float = param(0.01, "learning rate of the noise", 0, 1)
    self_weight: float = param(1.0, "weight of S_self", 0, 10)
    clean_weight: float = param(1.0, "weight of the clean loss; a tenth of it while sampling", 0, 10)
    scale: float = param(20.0, "step size of the descent while sampling", 0, 1000)
    refinements: int = param(20, "further descents at most at 20 and 40 percent of the run", 0, 50)
    window: Window = field(default=Window(0.0, 0.5), kw_only=True)
    where: Where = field(default=Where(kinds=("cross", "joint", "self"), near=1 / 16), kw_only=True)

    @property
    def searches(self) -> bool:
        return self.rounds > 0 and self.iterations > 0 and self.rate > 0

    @property
    def idle(self) -> bool:
        return self.window.empty or not (self.searches or self.scale) or not named(self.phrases, None)

    def begin(self, sampling: Sampling) -> Tracks:
        if self.searches:
            check_start(self, sampling)
        return Tracks(resolve_subjects(sampling, self.phrases))

    def noise(self, noise: torch.Tensor, sampling: Sampling, state: Tracks) -> torch.Tensor:
        if not self.searches:
            return noise
        read = sampling.maps_of
        assert read is not None

        def score(drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            cross, own, clean, _ = self._scores(read(drawn, self.where), state.subjects)
            value = cross + self.self_weight * own * (cross.detach() <= 0.5) + self.clean_weight * clean
            return value, (cross.detach() < ENOUGH_CROSS) & (own.detach() < ENOUGH_SELF)

        return search(noise, score, self.rounds, self.iterations, self.rate, LIMIT)

    def descent(self, step: Step) -> Descent:
        more = 0 if refined(step, REFINED) is None else self.refinements
        return Descent(step_size(self.scale, step), 1 + more)

    def loss(self, maps: StepMaps, step: Step, state: Tracks) -> Loss:
        cross, own, clean, found = self._scores(maps, state.subjects)
        align = (found - state.exchange(step, found)).abs().mean(dim=-1).sum(dim=-1)
        if not self.refinements or refined(step, REFINED) is None:
            return Loss(cross)
        joint = cross + self.self_weight * own + 0.1 * (self.clean_weight * clean + align)
        enough = (cross.detach() <= ENOUGH_CROSS) & (own.detach() <= ENOUGH_SELF)
        return Loss(torch.where(enough, cross, joint), last=enough)

    def _scores(
        self, maps: StepMaps, subjects: Subjects
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """S_cross, S_self and the clean loss, (batch,) each, and the maps (batch, subjects, latent tokens)."""
        found, valid = excited_maps(maps, subjects), subjects.valid
        _, grid = maps.mean_cross()
        own = torch.zeros_like(found[:, 0, 0])
        if self.self_weight:
            own = overlap(subject_rows(maps, found, grid), valid)
        return neglect(found, valid), own, scatter(found, valid, grid), found
