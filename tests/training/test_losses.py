"""The losses on attention, by hand and by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from attnctrl.training import assigned, dice, divergence, group_shares, in_unit_range, localisation, refined, region_mse
from tests.training.material import own_attention


def maps(*rows: list[float]) -> torch.Tensor:
    """One picture: (1, subjects, tokens)."""
    return torch.tensor([rows])


HALF = maps([1.0, 1.0, 0.0, 0.0])


def test_localisation() -> None:
    assert localisation(maps([0.5, 0.5, 0, 0]), HALF).item() == pytest.approx(-0.5, abs=1e-4)
    assert localisation(maps([0.3] * 4), HALF).item() == pytest.approx(0, abs=1e-4)
    assert localisation(maps([0.1, 0.2, 0.3, 0.4]), torch.ones(1, 1, 4)).item() == pytest.approx(-0.25, abs=1e-4)
    assert localisation(maps([0.1, 0.2, 0.3, 0.4]), torch.zeros(1, 1, 4)).item() == pytest.approx(0.25, abs=1e-4)
    # A soft edge counts on both sides: (.2 * .5 + .1) / 1.5 outside, (.6 + .2 * .5) / 1.5 inside.
    soft = localisation(maps([0.6, 0.2, 0.1]), maps([1.0, 0.5, 0.0])).item()
    assert soft == pytest.approx((0.2 - 0.7) / 1.5, abs=1e-4)


@pytest.mark.parametrize("scale", [0.01, 1.0, 40.0])
def test_the_facial_loss_does_not_depend_on_the_scale(scale: float) -> None:
    found = localisation(scale * maps([2.0, 2.0, 0, 0]), HALF, normalise=True)
    assert found.item() == pytest.approx(-1, abs=1e-3)


def test_peaks() -> None:
    shown = maps([0.1, 0.6, 0.3, 0.2])
    assert localisation(shown, maps([1.0, 0, 1, 0]), peaks=True).item() == pytest.approx(0.3)
    assert localisation(shown, torch.zeros(1, 1, 4), peaks=True).item() == pytest.approx(0.6)


def test_region_mse() -> None:
    shares = maps([0.7, 0.2], [0.1, 0.5])
    exact = region_mse(maps([1.0, 0.0]), maps([1.0, 0.0]), rest=torch.tensor([[0.0, 1.0]]))
    assert exact.item() == 0
    # StoryMaker's uniform case: the subject and the background each half, a binary mask.
    half = torch.full((1, 1, 4), 0.5)
    assert region_mse(half, HALF, rest=half[:, 0]).item() == pytest.approx(0.5)
    # AnyDressing's: two garments, one pixel, equal logits.
    assert region_mse(maps([0.5], [0.5]), maps([1.0], [0.0])).item() == pytest.approx(0.25)
    # By hand: ((.3^2 + .2^2) / 2 + (.1^2 + .5^2) / 2) / 2, and the second token alone has no mask.
    masks = maps([1.0, 0.0], [0.0, 0.0])
    assert region_mse(shares, masks).item() == pytest.approx((0.13 / 2 + 0.26 / 2) / 2)
    assert region_mse(shares, masks, covered_only=True).item() == pytest.approx((0.09 + 0.01) / 2)


def test_divergence() -> None:
    other = 1 - HALF
    # Complementary halves, at every size.
    assert divergence(HALF, other).item() == pytest.approx(0.111, abs=5e-4)
    assert divergence(HALF.repeat(1, 1, 50), other.repeat(1, 1, 50)).item() == pytest.approx(0.111, abs=5e-4)
    assert divergence(0.3 + 0.2 * HALF, HALF).item() == pytest.approx(0, abs=1e-6)
    assert divergence(HALF, other, temperature=0.01).item() == pytest.approx(math.log(2), abs=1e-3)
    assert torch.allclose(divergence(HALF, other), divergence(other, HALF))


def test_dice() -> None:
    assert dice(HALF, HALF).item() == pytest.approx(0, abs=1e-5)
    assert dice(HALF, 1 - HALF).item() == pytest.approx(1, abs=1e-4)
    assert dice(torch.full((1, 1, 4), 0.5), HALF).item() == pytest.approx(0.5, abs=1e-4)
    # Summed over subjects; one without a mask counts for nothing.
    both = dice(maps([0.5] * 4, [0.9] * 4), torch.cat([HALF, torch.zeros(1, 1, 4)], dim=1))
    assert both.item() == pytest.approx(0.5, abs=1e-4)


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "localisation": localisation,
    "facial": lambda *given: localisation(*given, normalise=True),
    "peaks": lambda *given: localisation(*given, peaks=True),
    "garments": region_mse,
    "covered garments": lambda *given: region_mse(*given, covered_only=True),
    "divergence": divergence,
    "dice": dice,
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_and_invariants(name: str) -> None:
    loss = LOSSES[name]
    shown, masks = uniform(2, 3, 7), (uniform(2, 3, 7, seed=1) > 0.5).double()
    assert torch.autograd.gradcheck(lambda m: loss(m, masks), shown.clone().requires_grad_(True))
    whole = loss(shown, masks)
    assert whole.shape == (2,)
    order = [2, 0, 1]
    assert torch.allclose(loss(shown[:, order], masks[:, order]), whole)
    # An absent subject counts for nothing, and gets no gradient.
    present = torch.tensor([[True, True, False], [True, True, True]])
    leaf = shown.clone().requires_grad_(True)
    part = loss(leaf, masks, present)
    assert torch.allclose(part[0], loss(shown[:1, :2], masks[:1, :2])[0])
    assert torch.allclose(part[1], whole[1])
    part.sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad[0, 2].any()
    assert leaf.grad[0, :2].any()
    none = loss(shown, masks, torch.zeros_like(present))
    assert torch.equal(none, torch.zeros(2, dtype=torch.float64))


def test_the_gradient_of_storymakers_loss() -> None:
    probs, masks = uniform(2, 5, 6), (uniform(2, 2, 5, seed=1) > 0.5).double()
    groups = torch.zeros(2, 3, 6, dtype=torch.bool)
    for group, tokens in enumerate(([1], [2, 3], [5])):
        groups[:, group, tokens] = True

    def loss(given: torch.Tensor) -> torch.Tensor:
        shares = group_shares(given, groups)
        return region_mse(shares[:, 1:], masks, rest=shares[:, 0])

    assert torch.autograd.gradcheck(loss, probs.clone().requires_grad_(True))
    shares = group_shares(probs, groups)
    assert torch.allclose(shares.sum(dim=1), torch.ones(2, 5, dtype=torch.float64))
    total = probs[0, 3, [1, 2, 3, 5]].sum()
    assert torch.allclose(shares[0, 1, 3], probs[0, 3, [2, 3]].sum() / total)
    # Words outside of the groups do not matter.
    other = probs.clone()
    other[..., [0, 4]] = 0.7
    assert torch.allclose(loss(other), loss(probs))


def test_unit_range() -> None:
    assert torch.allclose(in_unit_range(maps([0.2, 0.4]), "peak"), maps([0.5, 1.0]), atol=1e-4)
    assert torch.allclose(in_unit_range(maps([0.2, 0.4]), "range"), maps([0.0, 1.0]), atol=1e-4)
    assert torch.equal(in_unit_range(maps([0.2, 0.2]), "range"), maps([0.0, 0.0]))


def test_concept_masks() -> None:
    """Blocks of self-attention and one seed in each give the blocks back."""
    blocks = [[0, 1], [2, 3], [4, 5, 6]]
    own = own_attention(blocks)
    seeds = torch.zeros(1, 3, 7)
    for concept, block in enumerate(blocks):
        seeds[0, concept, block[0]] = 0.2
    found = assigned(refined(seeds, [own]))
    expected = torch.zeros(1, 3, 7, dtype=torch.bool)
    for concept, block in enumerate(blocks):
        expected[0, concept, block] = True
    assert torch.equal(found, expected)
    values = maps([0.9, 0.5, 0.5], [0.1, 0.45, 0.5])
    assert assigned(values, 0.1).tolist() == [[[True, False, False], [False, False, False]]]
    assert assigned(values, 0.0).tolist() == [[[True, True, False], [False, False, False]]]
    assert not assigned(values, 1.0).any()
