"""The scheduler that runs a rectified flow backwards; apart from the inversions, because it brings diffusers along."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler


class ReversedFlow(FlowMatchEulerDiscreteScheduler):
    """The Euler steps of a rectified flow from picture to noise."""

    # Pipelines inspect the signature to see which schedules it takes.
    @wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.sigmas: torch.Tensor = self.sigmas.flip(0)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
