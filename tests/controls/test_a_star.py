"""A-STAR against its card."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.fidelity.a_star import retention, segregation
from attnctrl.stepmaps import CrossMap, StepMaps
from tests.methods import SITES, sampling, step

D = torch.float64


def seg(*maps: list[float]) -> float:
    return segregation(torch.tensor([maps]), torch.ones(1, len(maps), dtype=torch.bool)).item()


def ret(maps: list[float], kept: list[float]) -> float:
    return retention(torch.tensor([[maps]]), torch.tensor([[kept]]), torch.tensor([[True]])).item()


def test_segregation_by_hand() -> None:
    assert seg([0.8, 0.2], [0.3, 0.7]) == pytest.approx(0.25)
    assert seg([0.8, 0.2], [0.8, 0.2]) == pytest.approx(0.5)
    assert seg(*[[0.4, 0.6]] * 3) == pytest.approx(1.5)
    assert seg([1.0, 0.0], [0.0, 1.0]) == 0.0
    assert seg([0.4, 0.6]) == 0.0  # one concept
    assert seg([0.0, 0.0], [0.0, 0.0]) == 0.0  # no division by zero


def test_retention_by_hand() -> None:
    assert ret([1.0, 0.0, 1.0], [1.0, 0.0, 1.0]) == pytest.approx(0.5)
    assert ret([1.0, 0.0], [0.0, 1.0]) == 1.0
    assert ret([1.0, 0.5], [1.0, 0.0]) == pytest.approx(1 - 1 / 2.5)
    assert ret([0.0, 0.0], [0.0, 0.0]) == 1.0


def test_padding_concepts_do_not_count() -> None:
    maps = torch.tensor([[[0.8, 0.2], [0.3, 0.7], [0.3, 0.7]]])
    valid = torch.tensor([[True, True, False]])
    assert segregation(maps, valid).item() == pytest.approx(0.25)
    assert retention(maps, maps, valid).item() == pytest.approx(2 * 0.5)


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = (torch.rand(2, 3, 5, dtype=D, generator=generator) + 0.05).requires_grad_(True)
    kept = (torch.rand(2, 3, 5, generator=generator) > 0.5).double() * 0.99
    valid = torch.tensor([[True, True, True], [True, True, False]])
    assert torch.autograd.gradcheck(lambda m: segregation(m, valid), maps)
    assert torch.autograd.gradcheck(lambda m: retention(m, kept, valid), maps)


UPPER_LEFT, LOWER_RIGHT = [0, 1, 4, 5], [10, 11, 14, 15]
GRID = (4, 4)


def maps_with(columns: dict[int, list[int]], strength: float = 0.5) -> StepMaps:
    """4 x 4 pixels, 24 tokens: `strength` at the given pixels of the given columns, 0.001 elsewhere."""
    probs = torch.full((1, 16, 24), 0.001)
    for column, pixels in columns.items():
        probs[0, pixels, column] = strength
    return StepMaps({"c": CrossMap(SITES[1], (1, *GRID), probs)})


APART = maps_with({2: UPPER_LEFT, 5: LOWER_RIGHT})
ELSEWHERE = maps_with({2: LOWER_RIGHT, 5: UPPER_LEFT})


def test_the_memory_is_of_the_step_before() -> None:
    """No retention in the first step; then the binary map of the last evaluation of the previous step."""
    control = ac.AStar(("cat", "dog"), segregation_weight=0.0)
    state = control.begin(sampling(grid=GRID))
    first = control.loss(APART, step(0), state)
    again = control.loss(APART, step(0), state)  # a second iteration of the same step
    assert first.value.item() == 0.0
    assert again.value.item() == 0.0
    kept = state.latest.clone()
    assert kept[0, 0].nonzero().flatten().tolist() == UPPER_LEFT
    assert kept[0, 1].nonzero().flatten().tolist() == LOWER_RIGHT
    same = control.loss(APART, step(1), state).value.item()
    assert torch.equal(state.before, kept)
    control.loss(ELSEWHERE, step(1), state)
    assert torch.equal(state.before, kept)  # within a step the memory stands still
    moved = control.loss(ELSEWHERE, step(1), state).value.item()
    assert 1.0 <= same < moved <= 2.0  # two concepts, each in [0.5, 1]
    back = control.loss(APART, step(2), state).value.item()
    assert back > same  # now the step before had the concepts elsewhere


def test_the_weights() -> None:
    def value(**weights: float) -> float:
        control = ac.AStar(("cat", "dog"), **weights)
        state = control.begin(sampling(grid=GRID))
        control.loss(APART, step(0), state)
        return control.loss(ELSEWHERE, step(1), state).value.item()

    only_seg = value(segregation_weight=1.0, retention_weight=0.0)
    only_ret = value(segregation_weight=0.0, retention_weight=1.0)
    assert only_seg > 0
    assert only_ret > 0
    assert value(segregation_weight=2.0, retention_weight=3.0) == pytest.approx(2 * only_seg + 3 * only_ret, rel=1e-5)


def test_the_memory_does_not_dominate() -> None:
    """Maps are divided by their maximum first, so a faint map where the memory is costs no more than a strong one."""
    control = ac.AStar(("cat",), segregation_weight=0.0)
    values = []
    for strength in (0.5, 0.05):
        maps = maps_with({2: UPPER_LEFT}, strength)
        state = control.begin(sampling(grid=GRID))
        control.loss(maps, step(0), state)
        assert state.latest.amax() == 1
        values.append(control.loss(maps, step(1), state).value.item())
    assert values[0] == pytest.approx(values[1], abs=0.1)


def test_memory_is_per_picture() -> None:
    control = ac.AStar(("cat", "dog"))
    state = control.begin(sampling(grid=GRID, images=2))
    probs = torch.cat([APART.cross["c"].probs, ELSEWHERE.cross["c"].probs])
    both = StepMaps({"c": CrossMap(SITES[1], (1, *GRID), probs)})
    control.loss(both, step(0), state)
    assert not torch.equal(state.latest[0], state.latest[1])
    values = control.loss(both, step(1), state).value
    torch.testing.assert_close(values[0], values[1])  # mirror images of each other
