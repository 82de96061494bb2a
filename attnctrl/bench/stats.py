"""Intervals for what a bench measures: pure functions of the measured numbers, the same on every machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A measured value and the ends of its 95% interval, all in the unit of what was measured."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: int, trials: int) -> Estimate:
    """A proportion with Wilson's score interval, which keeps a width where all trials agree.

    Raises:
        ValueError: there are no trials, or successes is outside 0..trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials is no proportion")
    share, z = successes / trials, Z95
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    # At the ends the formula gives 0 and 1 up to rounding: the interval must still hold the share.
    return Estimate(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of one value per picture, with the percentile bootstrap over pictures.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    data = _checked(values)
    chosen = np.random.default_rng(seed).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.quantile(data[chosen].mean(axis=1), (0.025, 0.975))
    return Estimate(float(data.mean()), float(low), float(high))


def mean_interval(values: Sequence[float]) -> Estimate:
    """The mean of one value per picture: Wilson where every value is 0 or 1, the bootstrap elsewhere.

    Shares of objects are often 1 in every picture, where resampling would give an interval of no width.
    """
    data = _checked(values)
    if bool(np.isin(data, (0.0, 1.0)).all()):
        return wilson(int(data.sum()), len(data))
    return bootstrap_mean(values)


def ratio_of_medians(times: Sequence[float], baseline: Sequence[float], seed: int = 0) -> Estimate:
    """median(times) / median(baseline), resampling whole repetitions: entry i of both was taken in repetition i.

    Raises:
        ValueError: the two are not equally long or are empty, or the baseline is not positive throughout.
    """
    a, b = _checked(times), _checked(baseline)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} times for {len(b)} of the baseline")
    if b.min() <= 0:
        raise ValueError("every time of the baseline must be positive")
    chosen = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    ratios = np.median(a[chosen], axis=1) / np.median(b[chosen], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Estimate(float(np.median(a) / np.median(b)), float(low), float(high))


def _checked(values: Sequence[float]) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0 or not np.isfinite(data).all():
        raise ValueError("an interval needs at least one value, and finite ones only")
    return data
