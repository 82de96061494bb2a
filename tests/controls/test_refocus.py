"""Attention refocusing against its card."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.layout.refocus import cross_refocus, schedule, self_refocus
from attnctrl.stepmaps import CrossMap, StepMaps
from tests.methods import SITES, sampling, self_map, step
from tests.probes import REGIONS

D = torch.float64


def car(
    maps: list[list[float]], tokens: list[list[bool]], masks: list[list[float]], early: bool
) -> tuple[float, float]:
    loss, least = cross_refocus(torch.tensor([maps]), torch.tensor([tokens]), torch.tensor([masks]), early)
    return loss.item(), least.item()


def one_word(inside: float, outside: float, early: bool) -> float:
    """One word, one region: pixel 0; pixel 1 is background."""
    return car([[inside, outside]], [[True]], [[1.0, 0.0]], early)[0]


@pytest.mark.parametrize(
    ("inside", "early", "expected"),
    [
        (0.05, True, 6 * 0.95),
        (0.05, False, 6 * 0.95),
        (0.15, True, 0.85),
        (0.15, False, 0.85),
        (0.5, True, 0.5),
        (0.5, False, 0.0),
        (1.0, True, 0.0),
    ],
)
def test_the_thresholds_inside(inside: float, early: bool, expected: float) -> None:
    assert one_word(inside, 0.0, early) == pytest.approx(expected)


def test_the_background_counts_by_half_at_any_time() -> None:
    for early in (True, False):
        assert one_word(1.0, 0.3, early) == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("there", "early", "expected"),
    [
        (0.2, True, 0.8),
        (0.2, False, 0.8),
        (0.12, True, 0.12),
        (0.12, False, 0.12),
        (0.05, True, 0.05),
        (0.05, False, 0.0),
    ],
)
def test_the_thresholds_in_other_boxes(there: float, early: bool, expected: float) -> None:
    """Two words, two boxes, no background; the first word strays into the second's box. Mean over two objects."""
    maps = [[1.0, there], [0.0, 1.0]]
    loss, _ = car(maps, [[True, False], [False, True]], [[1.0, 0.0], [0.0, 1.0]], early)
    assert loss == pytest.approx(expected / 2)


def test_one_object_in_the_whole_picture() -> None:
    """The card: background and out terms 0, CAR = 1 - max alone."""
    loss, least = car([[0.3, 0.6, 0.4]], [[True]], [[1.0, 1.0, 1.0]], True)
    assert loss == pytest.approx(0.4)
    assert least == pytest.approx(0.6)


def test_a_one_hot_map_in_its_box_is_content() -> None:
    maps = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    loss, least = car(maps, [[True, False], [False, True]], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], True)
    assert (loss, least) == (0.0, 1.0)


def test_the_words_of_a_phrase_are_summed_and_the_least_counts() -> None:
    loss, least = car([[0.5, 0.0], [0.15, 0.0]], [[True, True]], [[1.0, 0.0]], True)
    assert loss == pytest.approx(0.5 + 0.85)
    assert least == pytest.approx(0.15)


def test_padding_regions_do_not_count() -> None:
    full = car([[0.5, 0.1]], [[True]], [[1.0, 0.0]], True)
    padded = car([[0.5, 0.1]], [[True], [False]], [[1.0, 0.0], [0.0, 0.0]], True)
    assert padded == pytest.approx(full)


def test_a_small_box_covers_part_of_a_cell() -> None:
    """ "any" rasters hold 1 for part of a cell; masks in (0, 1] count as inside too."""
    assert car([[0.5, 0.1]], [[True]], [[0.2, 0.0]], True) == car([[0.5, 0.1]], [[True]], [[1.0, 0.0]], True)


def sar(attention: torch.Tensor, masks: torch.Tensor) -> float:
    outside = self_map(attention, (1, len(attention))).apply((masks == 0).float().transpose(1, 2))
    return self_refocus(outside, masks).item()


UNIFORM = torch.full((4, 4), 0.25)
BOXES = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]])


def test_the_self_attention_loss_by_hand() -> None:
    assert sar(UNIFORM, BOXES[:, :1]) == pytest.approx(0.5)  # area outside
    assert sar(UNIFORM, BOXES) == pytest.approx((0.5 + 0.75) / 2)  # a mean over boxes
    assert sar(UNIFORM, torch.ones(1, 1, 4)) == pytest.approx(0.0)  # a box of the whole picture
    block = torch.full((4, 4), 1e-12)
    block[:2, :2] = 0.5
    block[2:, 2:] = 0.5
    assert sar(block, torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]])) == pytest.approx(0.0, abs=1e-6)
    assert sar(block, torch.tensor([[[1.0, 0.0, 1.0, 0.0]]])) == pytest.approx(0.5)


def test_an_empty_box_is_no_division_by_zero() -> None:
    masks = BOXES.clone()
    masks[:, 1] = 0
    assert sar(UNIFORM, masks) == pytest.approx(0.5)
    assert sar(UNIFORM, torch.zeros(1, 1, 4)) == 0.0


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 4, 6, dtype=D, generator=generator).requires_grad_(True)
    tokens = torch.tensor([[[True, True, False, False], [False, False, True, False]]]).expand(2, -1, -1)
    masks = torch.tensor([[[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]]], dtype=D).expand(2, -1, -1)
    for early in (True, False):
        assert torch.autograd.gradcheck(lambda m, e=early: cross_refocus(m, tokens, masks, e)[0], maps)
    outside = torch.rand(2, 6, 2, dtype=D, generator=generator).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda o: self_refocus(o, masks.float()), outside)


def test_the_schedule_of_the_official_code() -> None:
    found = [schedule(step(i)) for i in range(50)]
    assert found[:2] == [(4.0, 2)] * 2
    assert found[2:5] == [(4.0, 6)] * 3
    assert found[5:10] == [(3.0, 3)] * 5
    later = {i: found[i] for i in range(10, 50) if found[i][1] > 0}
    assert later == {10: (3.0, 2), 15: (3.0, 2), 20: (1.0, 2), 25: (1.0, 2), 30: (1.0, 2), 35: (1.0, 2)}
    assert sum(n for _, n in found[:10]) == 37  # the card's count of passes
    assert sum(n for _, n in found[10:]) == 12


@pytest.mark.parametrize("total", [4, 10, 20, 25, 100])
def test_the_schedule_in_runs_of_other_lengths(total: int) -> None:
    """The later visits stay at the tenths of the run, at most one for each."""
    found = [schedule(step(i, total)) for i in range(total)]
    later = [i / total for i in range(total) if i / total >= 0.2 and found[i][1] > 0]
    assert all(at < 0.72 for at in later)
    tenths = [int(at * 10 + 1e-6) for at in later]
    assert len(set(tenths)) == len(tenths)
    assert found[0] == (4.0, 2)


def probs_where(left: float, right: float) -> torch.Tensor:
    """2 x 2 pixels, 24 tokens: the cat's column (2) has `left` in the left half, `right` in the right one."""
    probs = torch.full((1, 4, 24), 0.01)
    probs[0, [0, 2], 2] = left
    probs[0, [1, 3], 2] = right
    return probs


def test_the_loss_of_the_control() -> None:
    state_of = sampling(grid=(2, 2))
    maps = StepMaps({"c": CrossMap(SITES[1], (1, 2, 2), probs_where(0.5, 0.1))}, {"s": self_map(UNIFORM, (2, 2))})
    both, cross, own = (
        ac.Refocus(REGIONS, cross_weight=c, self_weight=s) for c, s in ((1.0, 1.0), (1.0, 0.0), (0.0, 2.0))
    )
    values = {c: c.loss(maps, step(0), c.begin(state_of)).value.item() for c in (both, cross, own)}
    assert values[own] == pytest.approx(2 * 0.5)
    assert values[both] == pytest.approx(values[cross] + 0.5)
    assert values[cross] > 0


def test_the_descent_ends_when_every_word_is_in_its_box() -> None:
    state = ac.Refocus(REGIONS).begin(sampling(grid=(2, 2)))
    for strong, done in ((False, False), (True, True)):
        probs = torch.full((1, 4, 24), 0.01)
        if strong:
            probs[0, [0, 2], 2] = 0.5  # the cat in the left half
            probs[0, [1, 3], 5] = 0.5  # the dog in the right one
        maps = StepMaps({"c": CrossMap(SITES[1], (1, 2, 2), probs)}, {"s": self_map(UNIFORM, (2, 2))})
        found = ac.Refocus(REGIONS).loss(maps, step(0), state).done
        assert found is not None
        assert found.tolist() == [done]


def test_the_step_size_follows_the_schedule() -> None:
    control = ac.Refocus(REGIONS, scale=5.0)
    first = control.descent(step(0))
    assert first is not None
    assert (first.scale, first.iterations) == (20.0, 2)
    off = control.descent(step(11))
    assert off is not None
    assert off.iterations == 0
