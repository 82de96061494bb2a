"""Classifier-free guidance as a control sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Prediction:
    """The denoiser's predictions of one step, each (batch, channels, height, width), frames before height for video.

    uncond is None without classifier-free guidance. combined: what the pipeline made of the two and the scheduler
    would get. again: run the denoiser once more on the conditional rows of this step, without controls, with other
    text embeddings of shape (batch, tokens, channels) if given.
    """

    cond: torch.Tensor
    uncond: torch.Tensor | None
    combined: torch.Tensor
    again: Callable[[torch.Tensor | None], torch.Tensor]

    @property
    def scale(self) -> float:
        """The guidance scale s of combined = uncond + s (cond - uncond), by least squares; 1 without guidance.

        Some pipelines keep theirs to themselves, and some rescale the combination afterwards.
        """
        if self.uncond is None:
            return 1.0
        apart = (self.cond - self.uncond).double().flatten()
        length = float(apart @ apart)
        return float((self.combined - self.uncond).double().flatten() @ apart) / length if length else 1.0

    def after(self, combined: torch.Tensor) -> Prediction:
        """What the next control sees once this one wanted `combined`: a conditional prediction that leads there."""
        cond = combined if self.uncond is None else self.uncond + (combined - self.uncond) / self.scale
        return replace(self, cond=cond, combined=combined)
