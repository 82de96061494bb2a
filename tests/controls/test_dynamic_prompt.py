"""Dynamic prompt learning against its card."""

from __future__ import annotations

import math

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.fidelity.dynamic_prompt import (
    background_of,
    clusters,
    disjoint,
    on_background,
    threshold,
)
from attnctrl.stepmaps import CrossMap, StepMaps
from tests import tiny
from tests.methods import SITES, sampling, self_map, step

D = torch.float64
BOTH = torch.tensor([[True, True]])


def test_disjoint_by_hand() -> None:
    maps = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]])
    assert disjoint(maps[:, :2], BOTH).item() == 0.0
    assert disjoint(maps[:, [0, 0]], BOTH).item() == pytest.approx(1)
    every = torch.ones(1, 3, dtype=torch.bool)
    assert disjoint(maps, every).item() == pytest.approx(2 * 0.5**0.5 / 3)
    assert disjoint(maps[:, :1], every[:, :1]).item() == 0.0  # one noun: 0, not the mean of nothing
    assert disjoint(maps, torch.tensor([[True, True, False]])).item() == 0.0


def test_the_background_loss_by_hand() -> None:
    background = torch.tensor([[True, True, False, False]])
    maps = torch.tensor([[[0.2, 0.2, 0.0, 0.0], [0.0, 0.0, 0.5, 0.1]]])
    assert on_background(maps, background, BOTH).item() == pytest.approx(0.5)
    assert on_background(maps, background, torch.tensor([[True, False]])).item() == pytest.approx(1)
    assert on_background(maps, background, torch.tensor([[False, True]])).item() == 0.0
    assert on_background(maps, torch.zeros(1, 4, dtype=torch.bool), BOTH).item() == 0.0


def test_gradients_are_those_of_finite_differences() -> None:
    maps = torch.rand(2, 3, 5, dtype=D, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    valid = torch.tensor([[True, True, True], [True, False, False]])
    background = torch.tensor([[True, True, False, False, True], [False] * 5])
    assert torch.autograd.gradcheck(lambda m: disjoint(m, valid), maps)
    assert torch.autograd.gradcheck(lambda m: on_background(m, background, valid), maps)


def test_thresholds_fall_with_the_run() -> None:
    assert threshold(0.0, 0.3, 0.5) == 0.3
    assert threshold(0.5, 0.3, 0.5) == pytest.approx(0.3 / math.e)
    assert threshold(0.5, 0.3, 0.5) == pytest.approx(0.1104, abs=1e-4)


def test_clusters() -> None:
    rows = torch.tensor([[[0.0, 0.0], [0.1, 0.0], [5.0, 5.0], [5.1, 5.0], [0.0, 9.0]]])
    found = clusters(rows, 3)[0].tolist()
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert len({found[0], found[2], found[4]}) == 3
    assert torch.isfinite(clusters(torch.ones(1, 4, 2), 3).float()).all()  # nothing to part


def blocks(sizes: list[int]) -> torch.Tensor:
    """Self-attention of pixels that see their own segment alone: (1, n, n)."""
    own = torch.block_diag(*[torch.full((n, n), 1 / n) for n in sizes])
    return own[None] + 1e-6


def test_the_background_is_where_no_noun_looks() -> None:
    own = blocks([3, 3, 4, 3, 3])
    maps = torch.full((1, 2, 16), 0.01)
    maps[0, 0, :3], maps[0, 1, 6:10] = 0.5, 0.4  # the first and the third segment
    background = background_of(own, maps, BOTH)[0]
    expected = torch.ones(16, dtype=torch.bool)
    expected[:3] = False
    expected[6:10] = False
    assert torch.equal(background, expected)
    maps[0, 1, 13:] = 0.2  # half of its maximum is too much for background
    assert not background_of(own, maps, BOTH)[0, 13:].any()
    only = background_of(own, maps, torch.tensor([[True, False]]))[0]
    assert only[3:].all()


def maps_of(cat: list[int], dog: list[int], strength: float = 0.5) -> StepMaps:
    probs = torch.full((1, 16, 24), 0.001)
    probs[0, cat, 2], probs[0, dog, 5] = strength, strength
    own = blocks([4, 4, 4, 4])[0]
    return StepMaps({"c": CrossMap(SITES[1], (1, 4, 4), probs)}, {"s": self_map(own / own.sum(-1, True), (4, 4))})


def test_the_loss_of_the_control() -> None:
    def value(maps: StepMaps, **weights: float) -> float:
        given = {"attention_weight": 0.0, "background_weight": 0.0, "disjoint_weight": 0.0} | weights
        control = ac.DynamicPrompt(("cat", "dog"), **given)
        return control.loss(maps, step(0), control.begin(sampling(grid=(4, 4)))).value.item()

    apart, together = maps_of([0, 1, 2, 3], [12, 13, 14, 15]), maps_of([0, 1, 2, 3], [0, 1, 2, 3])
    assert value(apart, disjoint_weight=1.0) < 0.05 < value(together, disjoint_weight=1.0)
    assert value(apart, attention_weight=1.0) < value(maps_of([0], [15], 0.01), attention_weight=1.0)
    assert value(apart, background_weight=1.0) < 0.05
    parts = [value(apart, **{name: 1.0}) for name in ("attention_weight", "background_weight", "disjoint_weight")]
    whole = value(apart, attention_weight=2.0, background_weight=3.0, disjoint_weight=4.0)
    assert whole == pytest.approx(2 * parts[0] + 3 * parts[1] + 4 * parts[2], rel=1e-4)


def test_it_is_done_when_all_three_are_low() -> None:
    control = ac.DynamicPrompt(("cat", "dog"), background_weight=0.0)
    state = control.begin(sampling(grid=(4, 4)))
    good = maps_of(list(range(8)), list(range(8, 16)), 0.05)  # shares of 0.87
    for index, maps, done in ((0, good, True), (0, maps_of([0], [15], 0.01), False), (49, good, False)):
        found = control.loss(maps, step(index), state).done
        assert found is not None
        assert found.tolist() == [done]  # near the end of the run nothing is good enough


def test_the_background_is_found_once_in_a_step_from_all_steps() -> None:
    control = ac.DynamicPrompt(("cat", "dog"))
    state = control.begin(sampling(grid=(4, 4)))
    first, second = maps_of([0, 1, 2, 3], [12]), maps_of([8, 9, 10, 11], [12])
    control.loss(first, step(0), state)
    once = state.background
    control.loss(second, step(0), state)
    assert state.background is once
    control.loss(second, step(1), state)
    assert state.steps == 2
    assert state.maps is not None
    torch.testing.assert_close(state.maps[0, 0, [0, 8]], torch.tensor([0.2505, 0.2505]))
    assert not state.maps.requires_grad


def test_without_self_attention_the_sentence_says_what_to_do() -> None:
    control = ac.DynamicPrompt(("cat", "dog"))
    maps = StepMaps(maps_of([0], [15]).cross)
    with pytest.raises(ac.ControlError, match=r"reads self-attention on the grid .* background_weight=0"):
        control.loss(maps, step(0), control.begin(sampling(grid=(4, 4))))


def test_the_loss_falls_in_a_run() -> None:
    pipe = tiny.sd()
    control = ac.DynamicPrompt(scale=1000.0, iterations=4, window=ac.Window(0.0, 0.1))
    with ac.control(pipe, control) as run:
        tiny.draw(pipe, steps=1)
    values = [loss.values[0] for loss in run.losses]
    assert len(values) == 4
    assert values[-1] < values[0]
