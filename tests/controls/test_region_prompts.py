"""RegionPrompts: every region follows its own prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnctrl as ac
from attnctrl.controls.layout.region_prompts import couple_weights, feathered
from tests import tiny
from tests.probes import REGIONS

WHOLE = (0.0, 0.0, 1.0, 1.0)


def test_shares_by_hand() -> None:
    """Pixel 0: the first region alone; 1: both, weights 1 to 3; 2: half covered by the second; 3: uncovered."""
    masks = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.5, 0.0]]])
    regions, base = couple_weights(masks, torch.tensor([[1.0, 3.0]]), base_ratio=0.2)
    torch.testing.assert_close(regions[0], torch.tensor([[0.8, 0.2, 0.0, 0.0], [0.0, 0.6, 0.4, 0.0]]))
    torch.testing.assert_close(base[0], torch.tensor([0.2, 0.2, 0.6, 1.0]))


def test_regions_without_weight_leave_the_base_prompt() -> None:
    regions, base = couple_weights(torch.ones(1, 2, 3), torch.zeros(1, 2), base_ratio=0.0)
    assert (regions == 0).all()
    assert (base == 1).all()


@given(st.integers(0, 2**16), st.floats(0, 1))
def test_shares_sum_to_one(seed: int, base_ratio: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = (2 * torch.rand(2, 3, 10, generator=generator) - 0.5).clamp(0, 1)
    weights = 5 * torch.rand(2, 3, generator=generator)
    regions, base = couple_weights(masks, weights, base_ratio)
    torch.testing.assert_close(regions.sum(dim=1) + base, torch.ones(2, 10))
    assert (regions >= 0).all()
    assert (base >= base_ratio - 1e-6).all()
    permuted, _ = couple_weights(masks[:, [2, 0, 1]], weights[:, [2, 0, 1]], base_ratio)
    torch.testing.assert_close(permuted, regions[:, [2, 0, 1]])


def test_feathering() -> None:
    grid = (1, 6, 8)
    masks = torch.zeros(1, 2, 6, 8)
    masks[0, 0, :, :4] = 1
    masks[0, 1] = 1
    soft = feathered(masks.flatten(2), grid, 0.2).unflatten(-1, (6, 8))
    torch.testing.assert_close(soft[0, 1], masks[0, 1])  # a constant stays what it is, borders included
    row = soft[0, 0, 0]
    assert row.tolist() == sorted(row.tolist(), reverse=True)
    torch.testing.assert_close(row + row.flip(0), torch.ones(8))  # the border of two halves stays in the middle
    assert 0.5 < row[3] < 1
    torch.testing.assert_close(soft[0, 0], row.expand(6, 8))
    assert torch.equal(feathered(masks.flatten(2), grid, 0.0), masks.flatten(2))


def test_one_region_over_all_with_the_prompt_itself_is_stock() -> None:
    pipe = tiny.sd()
    same = ac.Region("a cat and a dog", box=WHOLE)
    with ac.control(pipe, ac.RegionPrompts((same,))):
        torch.testing.assert_close(tiny.draw(pipe), tiny.draw(tiny.sd()), atol=1e-4, rtol=1e-4)


def test_one_region_over_all_without_the_base_is_its_prompts_picture() -> None:
    """Where the base prompt has no share, the picture is that of the region's prompt."""
    pipe = tiny.sd()
    expected, stock = tiny.draw(pipe, "the red bird"), tiny.draw(pipe)
    one = ac.Region("cat", box=WHOLE, prompt="the red bird")
    with ac.control(pipe, ac.RegionPrompts((one,), base_ratio=0.0, window=ac.Window(0.0, 1.0))):
        drawn = tiny.draw(pipe)
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(drawn, stock, atol=1e-3)


def test_phrases_need_not_stand_in_the_prompt() -> None:
    pipe = tiny.sd()
    with ac.control(pipe, ac.RegionPrompts((ac.Region("zebra", box=(0, 0, 0.5, 1)),))) as run:
        assert torch.isfinite(tiny.draw(pipe, steps=1)).all()
    assert len(run.maps) == 0


def test_two_of_them_share_out_what_the_first_leaves() -> None:
    """Two controls with the same region over all: together they act like one with the product of the base ratios."""
    pipe = tiny.sd()
    one = ac.Region("cat", box=WHOLE, prompt="the red bird")

    def draw(*ratios: float) -> Any:
        with ac.control(pipe, *(ac.RegionPrompts((one,), base_ratio=r) for r in ratios)):
            return tiny.draw(pipe, steps=2)

    torch.testing.assert_close(draw(0.5, 0.4), draw(0.2), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(draw(0.5), draw(0.2), atol=1e-4)


@pytest.mark.parametrize("feather", [0.0, 0.25])
def test_weights_of_overlapping_regions(feather: float) -> None:
    pipe = tiny.sd()

    def draw(first: float, second: float) -> torch.Tensor:
        regions = (
            ac.Region("cat", box=(0, 0, 0.75, 1), weight=first),
            ac.Region("dog", box=(0.25, 0, 1, 1), weight=second),
        )
        with ac.control(pipe, ac.RegionPrompts(regions, feather=feather)):
            return tiny.draw(pipe, steps=2)

    torch.testing.assert_close(draw(1.0, 1.0), draw(3.0, 3.0), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(draw(1.0, 1.0), draw(9.0, 1.0), atol=1e-4)


def test_the_text_of_a_region() -> None:
    assert REGIONS[0].text == "cat"
    assert ac.Region("cat", box=WHOLE, prompt="a striped cat").text == "a striped cat"
