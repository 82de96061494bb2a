"""RegionMask: words are seen inside their regions only."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.layout.region_mask import region_bias
from tests import tiny
from tests.probes import REGIONS, Probs

# Two regions over three pixels: the first has pixels 0 and 1 and word 1, the second pixel 1 and words 1 and 2.
TOKENS = torch.tensor([[[False, True, False, False], [False, True, True, False]]])
MASKS = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.5, 0.49]]])


def test_the_bias_by_hand() -> None:
    out = math.log(0.25)
    expected = [
        [0, 3.0, out, 0],  # pixel 0: in the first region
        [0, 3.0, 3.0, 0],  # pixel 1: in both; half a cell is inside
        [0, out, out, 0],  # pixel 2: in none
    ]
    bias = region_bias(TOKENS, MASKS, weight=0.75, boost=3.0)
    torch.testing.assert_close(bias[0], torch.tensor(expected))


def test_full_weight_hides_and_no_weight_does_nothing() -> None:
    bias = region_bias(TOKENS, MASKS, weight=1.0, boost=0.0)[0]
    assert (bias == float("-inf")).nonzero().tolist() == [[0, 2], [2, 1], [2, 2]]
    assert (bias[torch.isfinite(bias)] == 0).all()
    assert (region_bias(TOKENS, MASKS, weight=0.0, boost=0.0) == 0).all()


def probabilities(*controls: ac.Control) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    probe = Probs(edit=lambda p: (kept.append(p), p)[1], where=ac.Where(near=1))
    with ac.control(tiny.sd(), *controls, probe) as run:
        tiny.draw(run.pipe, steps=1)
    return kept


@pytest.mark.parametrize("boost", [0.0, 4.0])
def test_words_are_not_seen_from_outside(boost: float) -> None:
    """With a boost the mask is additive, without one it is boolean."""
    everywhere = ac.Window(0.0, 1.0)
    layers = probabilities(ac.RegionMask(REGIONS, boost=boost, window=everywhere))
    assert layers
    for probs in layers:
        picture = probs.unflatten(2, (16, 16))  # (batch, heads, height, width, tokens)
        assert (picture[..., 8:, 2] == 0).all()
        assert (picture[..., :8, 5] == 0).all()
        assert (picture[..., :8, 2] > 0).all()
        assert (picture[..., 8:, 5] > 0).all()
        free = [i for i in range(24) if i not in (2, 5)]
        assert (picture[..., free] > 0).all()


def test_weight_scales_the_attention_from_outside() -> None:
    """log(1 - weight) on the logit is a factor of 1 - weight on the odds."""
    stock, half = probabilities()[0], probabilities(ac.RegionMask(REGIONS, weight=0.75, boost=0.0))[0]
    odds = [p.unflatten(2, (16, 16))[..., 8:, 2] / p.unflatten(2, (16, 16))[..., 8:, 0] for p in (stock, half)]
    torch.testing.assert_close(odds[1], 0.25 * odds[0], atol=1e-5, rtol=1e-3)


def test_a_phrase_of_two_regions_belongs_to_both() -> None:
    thirds = (ac.Region("cat", box=(0, 0, 0.25, 1)), ac.Region("cat", box=(0.75, 0, 1, 1)))
    probs = probabilities(ac.RegionMask(thirds, boost=0.0))[0].unflatten(2, (16, 16))
    assert (probs[..., 4:12, 2] == 0).all()
    assert (probs[..., :4, 2] > 0).all()
    assert (probs[..., 12:, 2] > 0).all()


def test_occurrences_can_be_told_apart() -> None:
    pipe = tiny.sd()
    kept: list[Any] = []
    regions = (
        ac.Region("a cat", box=(0, 0, 0.5, 1), occurrence=0),
        ac.Region("a cat", box=(0.5, 0, 1, 1), occurrence=1),
    )
    probe = Probs(edit=lambda p: (kept.append(p), p)[1], where=ac.Where(near=1))
    with ac.control(pipe, ac.RegionMask(regions, boost=0.0), probe):
        tiny.draw(pipe, "a cat and a cat", steps=1)
    picture = kept[0].unflatten(2, (16, 16))
    assert (picture[..., 8:, [1, 2]] == 0).all()
    assert (picture[..., :8, [4, 5]] == 0).all()
    assert (picture[..., :8, [1, 2]] > 0).all()
