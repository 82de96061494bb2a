"""The maps that losses read, and their preparation, against hand-computed cases."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from attnctrl.stepmaps import BLUR, CrossMap, SelfMap, StepMaps, blur, phrase_maps, token_shares
from tests.methods import SITES, self_map

D = torch.float64


def test_the_blur_is_that_of_attend_and_excite() -> None:
    """exp(-((x - 1) / (2 * 0.5))^2), normalised: the weights of the card."""
    line = torch.exp(-((torch.arange(3.0) - 1) ** 2))
    torch.testing.assert_close(torch.tensor(BLUR), line / line.sum())
    delta = torch.zeros(1, 1, 25, dtype=D)
    delta[..., 12] = 1
    spread = blur(delta, (1, 5, 5)).reshape(5, 5)
    assert spread[2, 2].item() == pytest.approx(0.5761**2, abs=1e-4)
    assert spread[1, 2].item() == pytest.approx(0.5761 * 0.2119, abs=1e-4)
    assert spread[1, 1].item() == pytest.approx(0.2119**2, abs=1e-4)
    assert spread[0].abs().sum() == 0
    assert spread.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("grid", [(1, 3, 4), (1, 2, 2), (1, 1, 5), (1, 4, 1), (1, 1, 1)])
def test_the_blur_keeps_constant_maps(grid: tuple[int, int, int]) -> None:
    constant = torch.full((2, 3, grid[1] * grid[2]), 0.3, dtype=D)
    torch.testing.assert_close(blur(constant, grid), constant)


def test_word_shares_are_among_the_tokens_that_compete() -> None:
    """x100 and softmax make the shares of the words nearly winner takes all."""
    probs = torch.tensor([[[0.9, 0.03, 0.05, 0.02, 0.0]]])
    shares = token_shares(probs, torch.tensor([[False, True, True, True, False]]))
    expected = torch.tensor([3.0, 5.0, 2.0]).softmax(dim=0)
    torch.testing.assert_close(shares[0, 0, 1:-1], expected)
    assert shares[0, 0, [0, -1]].tolist() == [0, 0]


def test_the_map_of_a_phrase_is_the_mean_of_its_tokens() -> None:
    probs = torch.tensor([[[0.1, 0.3, 0.6], [0.2, 0.4, 0.4]]])  # 2 pixels, 3 tokens
    tokens = torch.tensor([[[False, True, True], [True, False, False], [False, False, False]]])
    expected = torch.tensor([[[0.45, 0.4], [0.1, 0.2], [0.0, 0.0]]])
    torch.testing.assert_close(phrase_maps(probs, tokens), expected)


def test_self_maps_apply_their_matrix_without_building_it() -> None:
    matrix = torch.rand(6, 6, dtype=D, generator=torch.Generator().manual_seed(0)) + 0.1
    matrix = matrix / matrix.sum(dim=1, keepdim=True)
    one = self_map(matrix, (2, 3))
    values = torch.rand(1, 6, 4, dtype=D, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(one.dense()[0], matrix.float())
    torch.testing.assert_close(one.apply(values)[0], (matrix @ values[0]).float())


def test_self_maps_average_their_heads_and_mind_their_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 3, 4, 5, generator=generator)
    mask = torch.tensor([True, True, True, False])[None, None, None]
    one = SelfMap(SITES[0], (1, 2, 2), query, key, mask, 0.5)
    scores = (query @ key.transpose(-1, -2) * 0.5).masked_fill(~mask, float("-inf"))
    expected = scores.softmax(dim=-1).mean(dim=1)
    torch.testing.assert_close(one.dense(), expected)
    values = torch.randn(2, 4, 2, generator=generator)
    torch.testing.assert_close(one.apply(values), expected @ values)


def test_a_detached_self_map_has_no_gradient() -> None:
    query = torch.randn(1, 1, 4, 2, requires_grad=True)
    one = SelfMap(SITES[0], (1, 2, 2), query, query, None, 1.0)
    assert one.apply(torch.ones(1, 4, 1)).requires_grad
    assert not one.detached().apply(torch.ones(1, 4, 1)).requires_grad


def test_the_mean_over_sites_wants_one_grid() -> None:
    fine, coarse = torch.rand(1, 16, 3), torch.rand(1, 4, 3)
    maps = StepMaps({n: CrossMap(SITES[1], (1, 4, 4), p) for n, p in (("a", fine), ("b", 3 * fine))})
    mean, grid = maps.mean_cross()
    torch.testing.assert_close(mean, 2 * fine)
    assert grid == (1, 4, 4)
    maps.cross["c"] = CrossMap(SITES[1], (1, 2, 2), coarse)
    with pytest.raises(ac.ControlError, match=r"maps of several grids .*Where\(near=\.\.\.\)"):
        maps.mean_cross()
    assert maps.only({"a"}).mean_cross()[0] is not None
    with pytest.raises(ac.ControlError, match="selects no cross- or joint-attention site"):
        maps.only({"z"}).mean_cross()
