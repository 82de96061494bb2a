"""Rectified flows led towards a known picture or a known noise: the two controlled equations of RF inversion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Window, param
from attnctrl.guidance import Prediction
from attnctrl.sampling import Sampling
from attnctrl.sites import Step


def led(model: torch.Tensor, known: torch.Tensor, strength: float) -> torch.Tensor:
    """model + strength * (known - model): the drift between what the model wants and what is known."""
    return model + strength * (known - model)


@dataclass
class State:
    sampling: Sampling
    clean: torch.Tensor | None = None


@dataclass(frozen=True)
class TowardPicture(Control):
    """Controlled reverse ODE of RF inversion (Rout et al., arXiv 2410.10792, eq. 15).

    In the window the velocity is led to the one that ends in `source`: v + strength ((x - z_0) / sigma - v). Strength 1
    for the whole run gives the source, whatever the prompt; the paper uses 0.9 for the first quarter of 28 steps. Also
    on models that predict noise, in their own terms. Families: every one for pictures.
    """

    paper: ClassVar[str] = "arXiv 2410.10792"
    fixes: ClassVar[str] = "edits of a given picture that change the rest"

    window: Window = field(default=Window(0.0, 0.25), kw_only=True)
    source: Any = field(default=None, compare=False)
    strength: float = param(0.9, "eta: 0 is the model's own velocity, 1 the source's", 0, 1)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.source is None or not self.strength

    def begin(self, sampling: Sampling) -> State:
        return State(sampling)

    def guide(self, prediction: Prediction, step: Step, state: State) -> torch.Tensor:
        if state.clean is None:
            assert state.sampling.clean is not None
            state.clean = state.sampling.clean(self.source, prediction.cond)
        return led(prediction.combined.float(), prediction.toward(state.clean), self.strength)


@dataclass(frozen=True)
class TowardNoise(Control):
    """Controlled forward ODE of RF inversion (Rout et al., arXiv 2410.10792, eq. 8), for a run from picture to noise.

    The run starts from `source`, and its velocity is led to the one that ends in a noise of this seed: v + strength
    ((n - z) / (1 - sigma) - v). Strength 1 gives that noise itself, 0 the plain inversion; the paper uses 0.5. The
    scheduler: `attnctrl.reversed_flow.ReversedFlow`. Families: every one for pictures that draws by rectified flow.
    """

    paper: ClassVar[str] = "arXiv 2410.10792"
    fixes: ClassVar[str] = "inversions that end in something that is no noise"

    source: Any = field(default=None, compare=False)
    seed: int = field(default=0, kw_only=True)
    strength: float = param(0.5, "gamma: 0 is the model's own velocity, 1 ends in the noise itself", 0, 1)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.source is None

    def begin(self, sampling: Sampling) -> State:
        return State(sampling)

    def noise(self, noise: torch.Tensor, sampling: Sampling, state: State) -> torch.Tensor:
        assert sampling.clean is not None
        return sampling.clean(self.source, noise).expand_as(noise)

    def guide(self, prediction: Prediction, step: Step, state: State) -> torch.Tensor:
        model = prediction.combined.float()
        return led(model, prediction.toward_noise(self.ends_in(model)), self.strength)

    def ends_in(self, like: torch.Tensor) -> torch.Tensor:
        """The noise of this seed, the same for all pictures, float32 (1, channels, height, width)."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(1, *like.shape[1:], generator=generator).to(like.device)
