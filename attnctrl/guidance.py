"""Classifier-free guidance as a control sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Prediction:
    """The denoiser's predictions of one step, each (batch, channels, height, width).

    uncond is None without classifier-free guidance. scale: the pipeline's guidance scale.
    again: run the denoiser once more on the conditional rows of this step, without controls, with other text
    embeddings of shape (batch, tokens, channels) if given.
    """

    cond: torch.Tensor
    uncond: torch.Tensor | None
    scale: float
    again: Callable[[torch.Tensor | None], torch.Tensor]

    @property
    def combined(self) -> torch.Tensor:
        """What the pipeline itself would make of the two."""
        if self.uncond is None:
            return self.cond
        return self.uncond + self.scale * (self.cond - self.uncond)
