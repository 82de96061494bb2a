"""LoCo against its card."""

from __future__ import annotations

import math

import torch

import attnctrl as ac
from attnctrl.controls.layout.loco import local_constraint, padding_constraint, unit_range
from attnctrl.stepmaps import CrossMap, StepMaps
from tests.methods import SITES, sampling, self_map, step
from tests.probes import REGIONS

D = torch.float64
VALID = torch.tensor([[True]])
LEFT = torch.tensor([[[1.0, 0.0, 1.0, 0.0]]])  # the left half of 2 x 2


def test_min_max() -> None:
    maps = torch.tensor([[2.0, 4.0, 3.0], [0.7, 0.7, 0.7], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.0, 1.0, 0.5], [0.7, 0.7, 0.7], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(unit_range(maps), expected)


def test_the_local_constraint_by_hand() -> None:
    uniform = torch.full((1, 1, 4), 0.3)
    assert local_constraint(uniform, LEFT, VALID).item() == 0.25  # (1 - area)^2
    assert local_constraint(LEFT * 0.7, LEFT, VALID).item() == 0.0  # all mass inside
    assert local_constraint(uniform, torch.zeros(1, 1, 4), VALID).item() == 1.0  # an empty box
    assert local_constraint(torch.zeros(1, 1, 4), LEFT, VALID).item() == 1.0  # no attention at all
    third = torch.tensor([[[0.2, 0.4, 0.2, 0.2]]])
    assert local_constraint(third, LEFT, VALID).item() == torch.tensor((1 - 0.4) ** 2).item()


def test_phrases_are_summed_and_padding_is_not_counted() -> None:
    maps, masks = torch.full((2, 2, 4), 0.3), LEFT.expand(2, 2, 4)
    valid = torch.tensor([[True, True], [True, False]])
    torch.testing.assert_close(local_constraint(maps, masks, valid), torch.tensor([0.5, 0.25]))


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = (torch.rand(2, 3, 6, dtype=D, generator=generator) + 0.1).requires_grad_(True)
    masks = (torch.rand(2, 3, 6, generator=generator) > 0.5).double()
    valid = torch.tensor([[True, True, False], [True, True, True]])
    assert torch.autograd.gradcheck(lambda m: local_constraint(m, masks, valid), maps)
    assert torch.autograd.gradcheck(lambda m: local_constraint(unit_range(m), masks, valid), maps)
    start, end = (torch.rand(2, 6, dtype=D, generator=generator).requires_grad_(True) for _ in range(2))
    union = masks[:, 0]
    assert torch.autograd.gradcheck(lambda s, e: padding_constraint(s, e, union, 0.8, True), (start, end))


def test_the_gradient_of_an_empty_map_is_finite() -> None:
    for maps in (torch.zeros(1, 1, 4), torch.full((1, 1, 4), 0.5)):
        leaf = maps.clone().requires_grad_(True)
        for mask in (LEFT, torch.zeros(1, 1, 4)):
            (gradient,) = torch.autograd.grad(local_constraint(unit_range(leaf), mask, VALID).sum(), leaf)
            assert torch.isfinite(gradient).all()


def test_start_outside_and_end_inside_is_the_foreground() -> None:
    """SOT = 1 - M and EOT = M give A_PT = M: without the sigmoid the cross-entropy is 0, with it there is a floor."""
    union = LEFT[0]
    clipped = padding_constraint(1 - union, union, union, 0.8, squash=False)
    assert clipped.item() < 2e-4
    floor = padding_constraint(1 - union, union, union, 0.8, squash=True)
    by_hand = 0.5 * (math.log1p(math.exp(-1)) + math.log(2))  # pixels at sigmoid(1) with target 1, sigmoid(0) with 0
    assert abs(floor.item() - by_hand) < 1e-6
    # Min-max: any positive multiple of the same maps is as good.
    weak = padding_constraint(0.9 - 0.1 * union, 0.05 * union, union, 0.8, squash=False)
    assert weak.item() < 2e-4
    # The wrong way round is worse.
    assert padding_constraint(union, 1 - union, union, 0.8, squash=True) > floor + 0.1


def test_without_a_start_token_the_end_alone_is_the_foreground() -> None:
    union = LEFT[0]
    alone = padding_constraint(None, 0.3 * union, union, 0.8, squash=False)
    torch.testing.assert_close(alone, padding_constraint(torch.rand(1, 4), 0.3 * union, union, 0.0, squash=False))
    assert alone.item() < 2e-4


def test_beta_weighs_start_and_end() -> None:
    union, flat = LEFT[0], torch.full((1, 4), 0.4)
    assert padding_constraint(1 - union, flat, union, 1.0, squash=False) < 2e-4  # the start token alone
    assert padding_constraint(flat, union, union, 0.0, squash=False) < 2e-4  # the end token alone
    constant = padding_constraint(flat, flat, union, 0.8, squash=True)
    assert torch.isfinite(constant).all()


def maps_of(cross: torch.Tensor, attention: torch.Tensor) -> StepMaps:
    grid = (1, 2, 2)
    return StepMaps({"c": CrossMap(SITES[1], grid, cross)}, {"s": self_map(attention, (2, 2))})


def cross_map() -> torch.Tensor:
    """2 x 2 pixels, 24 tokens: cat (2) is seen at the upper left pixel alone, dog (5) everywhere alike."""
    probs = torch.zeros(1, 4, 24)
    probs[0, 0, 2] = 0.5
    probs[..., 5] = 0.2
    probs[..., 0] = 0.1
    return probs


NEARLY = 1e-12  # the tests' matrices are given by their logarithms
IDENTITY = torch.eye(4).clamp(min=NEARLY)
# Pixels 0 and 2 are the left half, 1 and 3 the right one; each attends to its own half.
HALVES = torch.tensor([[0.5, NEARLY, 0.5, NEARLY], [NEARLY, 0.5, NEARLY, 0.5]] * 2)


def test_self_attention_spreads_a_map_over_its_object() -> None:
    """With attention within halves, one pixel of the left half becomes the left half: nothing lies outside."""
    control = ac.LoCo(REGIONS, alpha=0.0)
    state = control.begin(sampling(grid=(2, 2)))
    value = control.loss(maps_of(cross_map(), HALVES), step(0), state).value
    torch.testing.assert_close(value, torch.tensor([0.0 + 0.25]), atol=1e-5, rtol=0)  # cat 0; dog (1 - 1/2)^2


def test_maps_are_min_max_normalised_first() -> None:
    """What every pixel has alike is no sign of the object: 0.5 inside and 0.1 outside is all inside."""
    probs = torch.full((1, 4, 24), 0.1)
    probs[0, [0, 2], 2] = 0.5
    probs[0, [1, 3], 5] = 0.5
    control = ac.LoCo(REGIONS, alpha=0.0)
    value = control.loss(maps_of(probs, IDENTITY), step(0), control.begin(sampling(grid=(2, 2)))).value
    torch.testing.assert_close(value, torch.zeros(1), atol=1e-5, rtol=0)


def test_identity_attention_is_layout_guidance() -> None:
    state = ac.LoCo(REGIONS).begin(sampling(grid=(2, 2)))
    probs = torch.rand(1, 4, 24, generator=torch.Generator().manual_seed(0))
    sharpened = ac.LoCo(REGIONS).loss(maps_of(probs, IDENTITY), step(0), state).value
    plain = ac.LoCo(REGIONS, sharpen=False).loss(maps_of(probs, IDENTITY), step(0), state).value
    torch.testing.assert_close(sharpened, plain, atol=1e-5, rtol=1e-5)


def test_alpha_adds_the_loss_of_the_special_tokens() -> None:
    state = ac.LoCo(REGIONS).begin(sampling(grid=(2, 2)))
    maps = maps_of(torch.rand(1, 4, 24, generator=torch.Generator().manual_seed(0)), HALVES)
    bare, full = (ac.LoCo(REGIONS, alpha=a).loss(maps, step(0), state).value for a in (0.0, 0.5))
    probs = maps.cross["c"].probs
    union = torch.ones(1, 4)  # both halves are regions
    end = 6  # start, five words, end
    expected = bare + 0.5 * padding_constraint(probs[..., 0], probs[..., end], union, 0.8, True)
    torch.testing.assert_close(full, expected)


def test_gradients_through_the_self_attention_can_be_cut() -> None:
    attention = HALVES.clone().requires_grad_(True)
    cross = cross_map().requires_grad_(True)
    state = ac.LoCo(REGIONS).begin(sampling(grid=(2, 2)))
    for detach in (False, True):
        value = ac.LoCo(REGIONS, detach_self_attn=detach).loss(maps_of(cross, attention), step(0), state).value
        gradients = torch.autograd.grad(value.sum(), (attention, cross), allow_unused=True)
        assert (gradients[0] is None) == detach
        assert gradients[1] is not None


def test_enough_stops_the_descent() -> None:
    state = ac.LoCo(REGIONS).begin(sampling(grid=(2, 2)))
    maps = maps_of(cross_map(), HALVES)  # 0.125 per region
    for enough, done in ((0.0, False), (0.12, False), (0.13, True)):
        found = ac.LoCo(REGIONS, enough=enough).loss(maps, step(0), state).done
        assert found is not None
        assert found.tolist() == [done]
