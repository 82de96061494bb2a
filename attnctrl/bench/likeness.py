"""How alike two pictures are: pure functions."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

MOST = 60.0
"""The PSNR of equal pictures, and the largest there is."""


def psnr(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of two pictures in 0..1, over the pixels of a bool mask (h, w) if given."""
    square = np.square(a.astype(np.float64) - b)
    error = float((square if where is None else square[where]).mean())
    return MOST if error < 10 ** (-MOST / 10) else -10 * float(np.log10(error))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al., 2004) of pictures (..., h, w, channels) in 0..1, mean over all.

    Gaussian windows of 11x11 with standard deviation 1.5, K1 = 0.01, K2 = 0.03, the edge left out.
    """
    first, second = (torch.from_numpy(np.ascontiguousarray(p)).double() for p in (a, b))
    height, width, channels = first.shape[-3:]
    x, y = (
        p.reshape(-1, height, width, channels).movedim(-1, 1).reshape(-1, 1, height, width) for p in (first, second)
    )
    place = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-place.square() / (2 * 1.5**2))
    line = line / line.sum()

    def mean(of: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(of, line.view(1, 1, 1, 11)), line.view(1, 1, 11, 1))

    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    one, two = 0.01**2, 0.03**2
    found = (2 * mx * my + one) * (2 * both + two) / ((mx * mx + my * my + one) * (vx + vy + two))
    return float(found.mean())
