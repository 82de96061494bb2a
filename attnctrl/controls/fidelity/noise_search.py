"""Search for a start noise under a differentiable score that leaves it Gaussian, picture by picture."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

Score = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From noise (batch, ...) to a loss (batch,), differentiable, and whether it is good enough (batch,) bool."""

EPSILON = 1e-3
KL_STEPS = 100


def divergence(mean: torch.Tensor, log_var: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, e^log_var) || N(0, 1)), the mean over elements: (batch, ...) -> (batch,)."""
    return (-0.5 * (1 + log_var - mean**2 - log_var.exp())).flatten(1).mean(dim=1)


class Adam:
    """Adam with a count of its own for each row, so that a picture does not depend on its batch."""

    def __init__(self, like: torch.Tensor, rate: float) -> None:
        self.rate = rate
        self.first, self.second = torch.zeros_like(like), torch.zeros_like(like)
        self.count = torch.zeros(len(like), dtype=torch.float32, device=like.device)

    def step(self, values: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The values (batch, ...) after one step of the rows in `rows`, (batch,) bool; the others stay."""
        wide = (-1, *[1] * (values.ndim - 1))
        chosen = rows.reshape(wide)
        self.count += rows
        self.first = torch.where(chosen, 0.9 * self.first + 0.1 * gradient, self.first)
        self.second = torch.where(chosen, 0.999 * self.second + 0.001 * gradient**2, self.second)
        count = self.count.clamp(min=1).reshape(wide)
        mean, spread = self.first / (1 - 0.9**count), self.second / (1 - 0.999**count)
        return torch.where(chosen, values - self.rate * mean / (spread.sqrt() + EPSILON), values)


def fresh(noise: torch.Tensor, number: int) -> torch.Tensor:
    """Unit noise that depends on each picture's own noise (batch, ...) and `number` alone: seeds repeat."""
    rows = []
    for row in noise:
        seed = zlib.crc32(row.detach().float().cpu().contiguous().numpy().tobytes()) + number
        rows.append(torch.randn(row.shape, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows).to(noise)


@dataclass
class _Best:
    """Of each picture: the lowest loss so far, the noise that had it, and the noise that its round began with."""

    loss: torch.Tensor
    noise: torch.Tensor
    raw: torch.Tensor
    found: torch.Tensor


def search(noise: torch.Tensor, score: Score, rounds: int, iterations: int, rate: float, limit: float) -> torch.Tensor:
    """The noise e^(v / 2) * raw + m that `score` likes best, with m and v learned by Adam (InitNO's algorithm).

    Each of `rounds` begins with raw noise, the first with the given one, m = v = 0, and takes `iterations` steps;
    after each the divergence from N(0, 1) is brought down to `limit`. A picture is done once its noise is good enough.
    Those that no round satisfies take five times as many steps from the best round's raw noise. noise:
    (batch, ...) of unit variance; a picture whose own noise is good enough keeps it bit for bit.
    """
    high = torch.full((len(noise),), float("inf"), device=noise.device)
    best = _Best(high, noise.clone(), noise.clone(), torch.zeros_like(high, dtype=torch.bool))
    for number in range(rounds):
        _round(noise if number == 0 else fresh(noise, number), score, iterations, rate, limit, best)
        if best.found.all():
            return best.noise
    _round(best.raw.clone(), score, 5 * iterations, rate, limit, best)
    return best.noise


def _round(raw: torch.Tensor, score: Score, iterations: int, rate: float, limit: float, best: _Best) -> None:
    mean, log_var = torch.zeros_like(raw), torch.zeros_like(raw)
    adam = Adam(torch.stack([mean, log_var], dim=1), rate)
    wide = (-1, *[1] * (raw.ndim - 1))
    for iteration in range(iterations + 1):
        values = torch.stack([mean, log_var], dim=1).requires_grad_(True)
        with torch.enable_grad():
            drawn = raw * (values[:, 1] / 2).exp() + values[:, 0]
            loss, enough = score(drawn)
            last = iteration == iterations
            gradient = None if last else torch.autograd.grad(loss.sum(), values)[0]
        better = ~best.found & ((loss.detach() < best.loss) | enough)
        best.loss = torch.where(better, loss.detach(), best.loss)
        best.noise = torch.where(better.reshape(wide), drawn.detach(), best.noise)
        best.raw = torch.where(better.reshape(wide), raw, best.raw)
        best.found = best.found | enough
        if gradient is None or best.found.all():
            return
        moved = adam.step(values.detach(), gradient, ~best.found)
        mean, log_var = _near_gaussian(moved, adam, ~best.found, limit).unbind(dim=1)


def _near_gaussian(values: torch.Tensor, adam: Adam, rows: torch.Tensor, limit: float) -> torch.Tensor:
    """Mean and log variance, (batch, 2, ...), after as many further steps as bring the divergence to `limit`."""
    for _ in range(KL_STEPS):
        leaf = values.detach().requires_grad_(True)
        with torch.enable_grad():
            apart = divergence(leaf[:, 0], leaf[:, 1])
            rows = rows & (apart.detach() > limit)
            if not rows.any():
                break
            (gradient,) = torch.autograd.grad(apart.sum(), leaf)
        values = adam.step(values.detach(), gradient, rows)
    return values
