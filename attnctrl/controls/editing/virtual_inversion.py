"""Virtual inversion: the source is noised, never inverted, and the edit keeps its distance to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, param
from attnctrl.controls.editing.sources import Sources
from attnctrl.errors import ControlError
from attnctrl.guidance import Prediction
from attnctrl.sampling import Sampling
from attnctrl.sites import Step


@dataclass
class State:
    """clean: the source's latents, known from the first prediction on."""

    sources: Sources
    sampling: Sampling
    clean: torch.Tensor | None = None


def transferred(edit: torch.Tensor, source: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """The edit's prediction without the source's error: edit - source + known."""
    return edit - source + known


@dataclass(frozen=True)
class VirtualInversion(Control):
    """Virtual inversion of InfEdit (Xu et al., arXiv 2312.04965); the same on flows is FlowEdit (2412.08629).

    The run draws the source and its edits together, prompt=[source, edit, ...], from the same noise, which is any. The
    source's prediction becomes the one that leads to the given picture, whatever the model says, and every edit's
    prediction e_t becomes e_t - e_s + that one (DDCM, alg. 2 of InfEdit). So equal prompts give the source exactly, and
    nothing is inverted or stored. With the sampler of consistency models (LCMScheduler), whose noise all pictures
    share, this is InfEdit; with the Euler steps of rectified flow it is FlowEdit with one noise for the run, for the
    edit's distance to the noised source moves by dt (v_t - v_s). Before `start` of the run the edits are the source
    (FlowEdit's n_max: start 0.14 is 24 of 28 steps). Put controls that change the prediction before this one.
    Families: every one for pictures.
    """

    paper: ClassVar[str] = "arXiv 2312.04965; arXiv 2412.08629"
    fixes: ClassVar[str] = "edits of a given picture that change the rest"

    source: Any = field(default=None, compare=False)
    start: float = param(0.0, "part of the run in which the edits are the source", 0, 1)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.source is None

    def begin(self, sampling: Sampling) -> State:
        if sampling.latent_grid[0] > 1:
            raise ControlError("VirtualInversion edits pictures: it has no form for videos.")
        return State(Sources.of(sampling, self.name), sampling)

    def guide(self, prediction: Prediction, step: Step, state: State) -> torch.Tensor:
        if state.clean is None:
            assert state.sampling.clean is not None
            one = prediction.cond[: state.sources.images]
            clean = state.sampling.clean(self.source, one)
            state.clean = clean.expand(one.shape).repeat(state.sources.prompts, *[1] * (one.ndim - 1))
        known = state.sources.of_source(prediction.toward(state.clean))
        if step.progress < self.start:
            return known
        combined = prediction.combined.float()
        moved = transferred(combined, state.sources.of_source(combined), known)
        return torch.where(state.sources.edits(moved), moved, known)

    def latents(self, latents: torch.Tensor, step: Step, state: State) -> torch.Tensor:
        """After the last step, without what the rounding of the steps has left."""
        if step.index < step.total - 1 or state.clean is None:
            return latents
        error = state.clean.to(latents) - state.sources.of_source(latents)
        return torch.where(state.sources.edits(latents), latents + error, state.clean.to(latents))
