from __future__ import annotations

import numpy as np
import pytest

from attnctrl.bench.stats import bootstrap_mean, mean_interval, ratio_of_medians, wilson


def test_wilson_is_the_textbook_interval() -> None:
    # Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662.
    found = wilson(81, 263)
    assert found.value == pytest.approx(81 / 263)
    assert found.low == pytest.approx(0.2553, abs=5e-5)
    assert found.high == pytest.approx(0.3662, abs=5e-5)


def test_wilson_has_width_where_all_agree() -> None:
    none, every = wilson(0, 10), wilson(10, 10)
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(0.2775, abs=5e-5)
    assert (every.value, every.high) == (1, 1)
    assert every.low == pytest.approx(1 - none.high)


def test_bootstrap_agrees_with_the_normal_interval_of_many_values() -> None:
    values = np.random.default_rng(0).uniform(size=400)
    found = bootstrap_mean(list(values))
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert found == bootstrap_mean(list(values))


def test_mean_interval_takes_wilson_for_yes_and_no_only() -> None:
    assert mean_interval([1, 0, 1, 1]) == wilson(3, 4)
    assert mean_interval([1.0] * 8) == wilson(8, 8)
    assert mean_interval([1, 0.5, 1, 1]) == bootstrap_mean([1, 0.5, 1, 1])


def test_ratio_of_medians_ignores_an_outlier_and_covers_noise() -> None:
    rng = np.random.default_rng(1)
    stock, other = rng.normal(1.0, 0.02, 25), rng.normal(1.5, 0.02, 25)
    stock[3] = 30.0
    found = ratio_of_medians(list(other), list(stock))
    assert found.value == pytest.approx(1.5, abs=0.05)
    assert found.low < found.value < found.high
    assert found.high - found.low < 0.2


@pytest.mark.parametrize("values", [[], [float("nan")], [[1.0]]])
def test_what_has_no_mean_is_refused(values: list) -> None:
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval(values)


def test_unpaired_or_impossible_times_are_refused() -> None:
    with pytest.raises(ValueError, match="2 times for 1"):
        ratio_of_medians([1, 2], [1])
    with pytest.raises(ValueError, match="positive"):
        ratio_of_medians([1], [0])
    with pytest.raises(ValueError, match="no proportion"):
        wilson(3, 2)
