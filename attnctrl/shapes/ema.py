"""Exponential moving average of trained weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


class Average:
    """Keeps average = decay * average + (1 - decay) * weights, for several modules.

    The decay is ramped up as (1 + n) / (10 + n), so that the random start is soon forgotten.

    Args:
        modules: by name; their floating-point state is averaged.
        decay: 0..1.
    """

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.modules, self.decay, self.updates = modules, decay, 0
        self.average = {n: {k: v.detach().clone() for k, v in m.state_dict().items()} for n, m in modules.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the modules' present weights."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, module in self.modules.items():
            now = module.state_dict()
            keys = [k for k, v in now.items() if v.is_floating_point()]
            torch._foreach_lerp_([self.average[name][k] for k in keys], [now[k] for k in keys], weight)

    def copy_to(self, modules: dict[str, nn.Module]) -> None:
        """Put the averages into modules of the same structure."""
        for name, module in modules.items():
            module.load_state_dict(self.average[name])

    def state_dict(self) -> dict[str, object]:
        """For a checkpoint."""
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """From a checkpoint."""
        average: dict[str, dict[str, Tensor]] = state["average"]  # type: ignore[assignment]
        for name, tensors in average.items():
            for key, value in tensors.items():
                self.average[name][key].copy_(value)
        self.updates = int(state["updates"])  # type: ignore[call-overload]


def take_average(modules: dict[str, nn.Module], checkpoint: Path) -> int:
    """Give modules the averaged weights that a stage's checkpoint, finished or not, holds; returns its step."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    average = Average(modules, 0.0)
    average.load_state_dict(saved["state"]["average"])
    average.copy_to(modules)
    return saved["step"]
