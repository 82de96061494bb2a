"""The encoded prompt as controls see it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Text:
    """What the text encoders made of the prompts, rows in the pipeline's order (prompt-major, then images).

    positive, negative: (batch, tokens, channels). pooled, negative_pooled: (batch, channels), where the family has
    them. negative is None without classifier-free guidance.
    """

    positive: torch.Tensor
    negative: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    negative_pooled: torch.Tensor | None = None

    def change(self, **fields: Any) -> Text:
        """A copy with some tensors replaced."""
        return replace(self, **fields)
