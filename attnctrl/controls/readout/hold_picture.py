"""A run that goes along a given picture, so that the denoiser sees that picture under the noise of each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control
from attnctrl.errors import ControlError
from attnctrl.guidance import Prediction
from attnctrl.sampling import Sampling
from attnctrl.sites import Step


@dataclass
class State:
    """clean: the picture's latents, known from the first prediction on."""

    sampling: Sampling
    clean: torch.Tensor | None = None


@dataclass(frozen=True)
class HoldPicture(Control):
    """Whatever the model predicts, the run's prediction is the one that leads to `picture`.

    So the denoiser sees the picture with as much noise as each step has, and what is read in the run is read of the
    picture: noising, as SLiMe (arXiv 2309.03179) and LDM correspondences (2305.15581) read given pictures. Under
    deterministic samplers the noise is that of the start throughout; under others (DDIM with eta=1) it is renewed.
    picture: one for all pictures of the run, or a list with one for each; anything that the pipeline's image processor
    takes, resized to the run. Put controls that change the prediction before this one. Families: every one for
    pictures.
    """

    paper: ClassVar[str] = "arXiv 2309.03179"
    fixes: ClassVar[str] = "attention to be read of a given picture"

    picture: Any = field(default=None, compare=False)

    @property
    def idle(self) -> bool:
        none = self.picture is None or (isinstance(self.picture, Sequence) and len(self.picture) == 0)
        return self.window.empty or none

    def begin(self, sampling: Sampling) -> State:
        if sampling.latent_grid[0] > 1:
            raise ControlError("HoldPicture holds pictures: it has no form for videos.")
        return State(sampling)

    def guide(self, prediction: Prediction, step: Step, state: State) -> torch.Tensor:
        if state.clean is None:
            assert state.sampling.clean is not None
            state.clean = state.sampling.clean(self.picture, prediction.own).expand(prediction.own.shape)
        return prediction.toward(state.clean)
