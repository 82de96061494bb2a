"""RegionMask: words are seen inside their regions only."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.layout.region_mask import joint_mask, region_bias, word_classes
from attnctrl.kernels import LowRankBias, TokenGroups
from attnctrl.sites import Call, Site, TokenLayout
from tests import tiny
from tests.methods import step
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


def test_words_of_the_same_regions_are_one_class() -> None:
    """Word 1 is of both regions, word 2 of the second; each is inside where its regions are."""
    words, inside = word_classes(TOKENS, MASKS)
    found = {tuple(word.nonzero().flatten().tolist()): i for i, word in enumerate(words[0])}
    assert found.keys() == {(1,), (2,)}
    assert inside[0, found[1,]].tolist() == [True, True, False]
    assert inside[0, found[2,]].tolist() == [False, True, False]


@pytest.mark.parametrize(("weight", "boost"), [(1.0, 0.0), (1.0, 3.0), (0.75, 3.0), (0.75, 0.0), (0.0, 3.0)])
def test_the_bias_of_one_sequence_is_that_of_text_keys_both_ways(weight: float, boost: float) -> None:
    """Text [0, 4), one more text token behind the prompt, latents [5, 8), a reference token."""
    layout, empty = TokenLayout(slice(5, 8), slice(0, 5), (1, 1, 3)), torch.empty(1, 1, 9, 1)
    call = Call(Site("a", "joint", "", 0), step(0), "cond", empty, empty, empty, 1.0, layout, layout)
    expected = torch.zeros(9, 9)
    bias = region_bias(TOKENS, MASKS, weight, boost)[0]
    expected[5:8, :4] = bias
    expected[:4, 5:8] = bias.T.clamp(max=0)  # words get no boost
    mask = joint_mask(*word_classes(TOKENS, MASKS), call, weight, boost)
    found = torch.zeros(9, 9)
    if isinstance(mask, LowRankBias):
        found = mask.dense()[0, 0]
        groups = mask.groups
    else:
        groups = mask
    assert (groups is None) == (weight < 1)
    assert isinstance(mask, TokenGroups) == (weight == 1 and boost == 0)
    if groups is not None:
        found = found.masked_fill(~groups.dense()[0, 0], float("-inf"))
    torch.testing.assert_close(found, expected)


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
