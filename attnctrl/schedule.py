"""Reading a diffusers scheduler: which step of its schedule runs, and how it scales the denoiser's input."""

from __future__ import annotations

from typing import Any

import torch

from attnctrl.sites import Step


class Schedule:
    """The schedule of one sampling; the timesteps are read once, because on a GPU every look costs a wait."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.timesteps: list[float] | None = None

    def step(self, timestep: Any, seen: list[Step]) -> Step:
        """The step that the denoiser is called for. seen: the steps before it, as some schedules repeat timesteps."""
        value = float(timestep.flatten()[0] if isinstance(timestep, torch.Tensor) else timestep)
        if self.timesteps is None:
            self.timesteps = self.scheduler.timesteps.tolist()
        total = len(self.timesteps)
        places = [i for i, t in enumerate(self.timesteps) if t == value]
        if places:
            # Heun and PNDM hold some timesteps twice; the second visit is the later place.
            visits = sum(step.timestep == value for step in seen)
            index = places[min(visits, len(places) - 1)]
        else:
            index = min(len(seen), total - 1)
        return Step(index, total, value, value / float(self.scheduler.config.num_train_timesteps))

    def input_scale(self, step: Step | None) -> float:
        """What `scale_model_input` multiplies the latents by at `step`."""
        if step is None or not hasattr(self.scheduler, "scale_model_input"):
            return 1.0
        return float(self.scheduler.scale_model_input(torch.ones(1), self.scheduler.timesteps[step.index]))
