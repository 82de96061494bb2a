"""The source of an edit drawn as it was: a known trajectory of latents takes the place of what the run makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, param
from attnctrl.controls.editing.sources import Sources, on_trajectory
from attnctrl.sampling import Sampling
from attnctrl.sites import Step


@dataclass(frozen=True)
class FollowSource(Control):
    """Direct inversion (PnP Inversion, Ju et al., arXiv 2310.01506) and edit-friendly DDPM (2304.06140).

    The run draws the source and its edits together: prompt=[source, edit, ...]. After every step the source's latents
    become those of `trajectory`, (steps + 1, pictures or 1, channels, height, width) from noise to picture. What that
    corrects is the source's alone (direct inversion), or, with `shared`, goes to the edits as well: with independent
    noisings of the source as the trajectory and a stochastic sampler whose noise all pictures share, that is the
    noise z_t of edit-friendly DDPM, whose draw by the sampler cancels. Before `start` of the run the edits are the
    source. Families: all.
    """

    paper: ClassVar[str] = "arXiv 2310.01506; arXiv 2304.06140"
    fixes: ClassVar[str] = "a source picture that is not reproduced"

    trajectory: Any = field(default=None, compare=False)
    shared: bool = field(default=False, kw_only=True)
    start: float = param(0.0, "part of the run in which the edits are the source", 0, 1)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.trajectory is None or len(self.trajectory) == 0

    def begin(self, sampling: Sampling) -> Sources:
        return Sources.of(sampling, self.name)

    def latents(self, latents: torch.Tensor, step: Step, state: Sources) -> torch.Tensor:
        source = on_trajectory(self.trajectory, step, latents, state, self.name)
        known = source.repeat(state.prompts, *[1] * (source.ndim - 1))
        if step.progress < self.start:
            return known
        moved = latents + (known - state.of_source(latents)) if self.shared else latents
        return torch.where(state.edits(latents), moved, known)
