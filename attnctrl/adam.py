"""Adam, for losses whose gradient has another size in every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BETAS, EPSILON = (0.9, 0.999), 1e-8


@dataclass
class Moments:
    """The running means of a gradient and of its square (Kingma and Ba, ICLR 2015, arXiv 1412.6980, algorithm 1)."""

    count: int = 0
    mean: torch.Tensor | None = None
    square: torch.Tensor | None = None

    def move(self, gradient: torch.Tensor) -> torch.Tensor:
        """The direction that replaces the gradient, each entry of a size about 1; descend it times the rate."""
        self.count += 1
        self.mean = gradient * (1 - BETAS[0]) + (0.0 if self.mean is None else BETAS[0] * self.mean)
        self.square = gradient**2 * (1 - BETAS[1]) + (0.0 if self.square is None else BETAS[1] * self.square)
        mean, square = self.mean / (1 - BETAS[0] ** self.count), self.square / (1 - BETAS[1] ** self.count)
        return mean / (square.sqrt() + EPSILON)
