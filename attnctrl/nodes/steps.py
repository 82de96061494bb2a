"""ComfyUI's sigmas as steps of a run."""

from __future__ import annotations

from typing import Any

import torch

from attnctrl.sites import Step

TOTAL = 10_000
"""A step's index is its place in the noise schedule, in so many parts: samplers do not number their calls."""


def step_at(sampling: Any, sigma: float) -> Step:
    """The step of a ComfyUI `model_sampling` at a sigma.

    Its progress is the percentage that core nodes ask for (start_percent), the inverse of `percent_to_sigma`.
    """
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        if float(sampling.percent_to_sigma(middle)) >= sigma * (1 - 1e-5):
            low = middle
        else:
            high = middle
    timestep, most = (float(sampling.timestep(torch.as_tensor(s))) for s in (sigma, float(sampling.sigma_max)))
    noise = min(max(timestep / most, 0.0), 1.0) if most > 0 else 1.0 - low
    return Step(round(low * TOTAL), TOTAL, timestep, noise)
