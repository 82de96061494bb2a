"""CONFORM against its card."""

from __future__ import annotations

import math

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.fidelity.conform import grouping
from attnctrl.stepmaps import CrossMap, StepMaps
from tests import tiny
from tests.methods import SITES, sampling, step

D = torch.float64
LEFT, RIGHT = [1.0, 0.0], [0.0, 1.0]


def value(vectors: list[list[float]], group: list[int], temperature: float = 0.5) -> float:
    return grouping(torch.tensor([vectors]), torch.tensor([group]), temperature)[0].item()


def test_the_loss_by_hand() -> None:
    """Similar within and orthogonal between the groups: ln(1 + 2 e^-2); the reverse: ln(1 + e^2 + 1)."""
    assert value([LEFT, LEFT, RIGHT, RIGHT], [0, 0, 1, 1]) == pytest.approx(math.log(1 + 2 * math.exp(-2)))
    assert value([LEFT, RIGHT, LEFT, RIGHT], [0, 0, 1, 1]) == pytest.approx(math.log(2 + math.exp(2)))
    # Three words: the pair (a, p) has one negative; nothing to pull the third to.
    expected = math.log(1 + math.exp(0.6 / 0.7 - 1 / 0.7))
    assert value([LEFT, [2.0, 0.0], [0.6, 0.8]], [0, 0, 1], 0.7) == pytest.approx(expected)


def test_nothing_to_pull_together_is_no_loss() -> None:
    vectors = torch.rand(2, 3, 4).requires_grad_(True)
    loss, pairs = grouping(vectors, torch.tensor([[0, 1, 2], [0, -1, -1]]), 0.5)
    assert loss.tolist() == [0, 0]
    assert pairs.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(loss.sum(), vectors)
    assert (gradient == 0).all()


def test_one_group_alone_is_no_loss_and_no_nan() -> None:
    vectors = torch.rand(1, 2, 4).requires_grad_(True)
    loss, _ = grouping(vectors, torch.tensor([[0, 0]]), 0.5)
    assert loss.item() == 0.0
    (gradient,) = torch.autograd.grad(loss.sum(), vectors)
    assert torch.isfinite(gradient).all()


def test_invariants() -> None:
    vectors = torch.rand(1, 5, 6, generator=torch.Generator().manual_seed(0), dtype=D)
    group = torch.tensor([[0, 0, 1, 1, 2]])
    loss = grouping(vectors, group, 0.5)[0]
    torch.testing.assert_close(grouping(7 * vectors, group, 0.5)[0], loss)
    torch.testing.assert_close(grouping(vectors, torch.tensor([[2, 2, 0, 0, 1]]), 0.5)[0], loss)
    padded = torch.cat([vectors, torch.rand(1, 2, 6, dtype=D)], dim=1)
    torch.testing.assert_close(grouping(padded, torch.tensor([[0, 0, 1, 1, 2, -1, -1]]), 0.5)[0], loss)


def test_the_gradient_is_that_of_finite_differences() -> None:
    vectors = torch.rand(2, 4, 5, dtype=D, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    group = torch.tensor([[0, 0, 1, 1], [0, 0, 1, -1]])
    assert torch.autograd.gradcheck(lambda v: grouping(v, group, 0.5)[0], vectors)


def maps_of(*columns: tuple[int, list[int]]) -> StepMaps:
    """4 x 4 pixels: 0.5 at the given pixels of the given columns, 0.001 elsewhere."""
    probs = torch.full((1, 16, 24), 0.001)
    for column, pixels in columns:
        probs[0, pixels, column] = 0.5
    return StepMaps({"c": CrossMap(SITES[1], (1, 4, 4), probs)})


UPPER, LOWER = [0, 1, 4, 5], [10, 11, 14, 15]


def test_the_step_before_is_remembered_without_its_graph() -> None:
    control = ac.Conform(("cat", "dog"))
    state = control.begin(sampling(grid=(4, 4)))
    apart, swapped = maps_of((2, UPPER), (5, LOWER)), maps_of((2, LOWER), (5, UPPER))
    apart.cross["c"].probs.requires_grad_(True)
    first = control.loss(apart, step(0), state)
    assert first.value.item() == 0.0
    assert first.done is not None
    assert first.done.tolist() == [True]  # bare nouns have nothing to be compared with yet
    stayed = control.loss(apart, step(1), state)
    assert state.before is not None
    assert not state.before.requires_grad
    moved = control.loss(swapped, step(1), state)
    assert 0 < stayed.value.item() < moved.value.item()
    kept = state.before.clone()
    control.loss(swapped, step(1), state)
    assert torch.equal(state.before, kept)  # never written to


def test_attributes_are_pulled_to_their_nouns() -> None:
    control = ac.Conform(pairs=(("a", "cat"), ("dog",)))
    given = sampling("a cat and the dog", grid=(4, 4))  # 1:a 2:cat 5:dog
    values = [
        control.loss(maps_of((1, place), (2, UPPER), (5, LOWER)), step(0), control.begin(given)).value.item()
        for place in (UPPER, LOWER)
    ]
    assert 0 < values[0] < values[1]


def test_shares_of_the_words() -> None:
    """With one word dominating a pixel its share is nearly 1, which the raw maps do not say."""
    found = []
    for shares in (False, True):
        control = ac.Conform(pairs=(("a", "cat"), ("dog",)), shares=shares)
        state = control.begin(sampling("a cat and the dog", grid=(4, 4)))
        found.append(control.loss(maps_of((1, UPPER), (2, LOWER), (5, UPPER)), step(0), state).value.item())
    assert found[0] != pytest.approx(found[1], abs=1e-3)


def test_the_schedule() -> None:
    """20 at the start, 14.14 at the end; further descents at steps 0, 10 and 20 of 50."""
    control = ac.Conform()
    counts = [control.descent(step(i)).iterations for i in range(25)]
    assert {i: n for i, n in enumerate(counts) if n != 1} == {0: 21, 10: 21, 20: 21}
    assert control.descent(step(0)).scale == 20
    assert control.descent(step(25)).scale == pytest.approx(20 * math.sqrt(0.75))
    assert control.window == ac.Window(0.0, 0.5)
    # Where the moments fall between two steps, the later one takes them.
    assert [i for i in range(6) if control.descent(step(i, 12)).iterations > 1] == [0, 3, 5]


def test_under_heun_every_step_is_compared_with_the_one_before() -> None:
    """Its schedule holds timesteps twice; one descent for both, so that no map is its own memory."""
    pipe = tiny.sd("heun")
    with ac.control(pipe, ac.Conform(("cat", "dog"), refinements=0, window=ac.Window())) as run:
        tiny.draw(pipe, steps=3)
    assert [loss.step for loss in run.losses] == sorted({loss.step for loss in run.losses})
    assert len(run.losses) == 3
    assert run.losses[0].values[0] == 0
    assert all(loss.values[0] > 0 for loss in run.losses[1:])


def test_a_prompt_parsed_by_default() -> None:
    pipe = tiny.sd()
    drawn = []
    for control in (ac.Conform(), ac.Conform(pairs=(("red", "cat"), ("bird",)))):
        with ac.control(pipe, control):
            drawn.append(tiny.draw(pipe, "a red cat and the bird", steps=2))
    assert torch.equal(drawn[0], drawn[1])
