"""Divide & Bind against its card."""

from __future__ import annotations

import math

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.fidelity.divide_bind import bind_weight, binding, mean_binding, total_variation
from attnctrl.pairs import Words
from attnctrl.stepmaps import CrossMap, StepMaps
from tests.methods import SITES, sampling, step

D = torch.float64
GRID = (1, 2, 3)


def tv(rows: list[list[float]], **more: bool) -> float:
    maps = torch.tensor(rows)
    return total_variation(maps.flatten()[None, None], (1, *maps.shape), **more).item()


def test_total_variation_by_hand() -> None:
    rows = [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    # Along rows: 1, 0, 0 of three differences; along columns: 1, 0 and 1, 1 of four.
    assert tv(rows) == pytest.approx(1 / 3 + 3 / 4)
    # The official code: |last row - row| of the second and third row: 1, 1 and 0, 0.
    assert tv(rows, last_row=True) == pytest.approx(1 / 3 + 2 / 4)
    assert tv([[0.4, 0.4], [0.4, 0.4]]) == 0.0
    assert tv([[0.0, 1.0]]) == 1.0  # one row has no neighbour
    assert tv([[0.3]]) == 0.0


def jsd(p: list[float], q: list[float]) -> float:
    def half(a: list[float]) -> float:
        return sum(x * math.log(2 * x / (x + y)) for x, y in zip(a, q if a is p else p, strict=True))

    return (half(p) + half(q)) / 2


def test_binding_by_hand() -> None:
    """Two pixels: softmaxes (e, 1) / (e + 1) and its mirror image, of which 0.3 * e / (e + 1) counts for nothing."""
    high, low = math.e / (math.e + 1), 1 / (math.e + 1)
    above = [high - 0.3 * high + 1e-5, low - 0.3 * high + 1e-5]
    noun, attribute = torch.tensor([1.0, 0.0], dtype=D), torch.tensor([0.0, 0.5], dtype=D)  # scaled to the noun's 1
    literal = binding(noun, attribute, torch.tensor(False), normalised=False)
    assert literal.item() == pytest.approx(jsd(above, above[::-1]), rel=1e-6)
    total = sum(above)
    p = [a / total for a in above]
    found = binding(noun, attribute, torch.tensor(False)).item()
    assert found == pytest.approx(jsd(p, p[::-1]), rel=1e-6)
    assert 0 < binding(noun, attribute, torch.tensor(True)).item() < found < math.log(2)
    assert binding(noun, noun * 0.2, torch.tensor(False)).item() == pytest.approx(0, abs=1e-7)


def words(group: list[int], noun: list[bool]) -> Words:
    tokens = torch.ones(1, len(group), 3, dtype=torch.bool)
    return Words(tokens, tokens[:, 0], torch.tensor([group]), torch.tensor([noun]))


def test_binding_is_the_mean_over_the_attributes_of_a_noun() -> None:
    maps = torch.rand(1, 5, 6, generator=torch.Generator().manual_seed(0))
    given = words([0, 0, 0, 1, -1], [False, False, True, True, False])
    varied = torch.zeros(1, 5, dtype=torch.bool)
    found = mean_binding(maps, given, varied)[0]
    one, two = (binding(maps[0, 2], maps[0, w], varied[0, 2]) for w in (0, 1))
    torch.testing.assert_close(found, torch.stack([one * 0, one * 0, (one + two) / 2, one * 0, one * 0]))


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 6, dtype=D, generator=generator).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda m: total_variation(m, GRID), maps)
    assert torch.autograd.gradcheck(lambda m: total_variation(m, GRID, last_row=True), maps)
    for varied in (True, False):
        flags = torch.full((2,), varied)
        assert torch.autograd.gradcheck(lambda m, f=flags: binding(m[:, 0], m[:, 1], f), maps)


def maps_of(peaks: dict[int, float], base: float = 0.01) -> StepMaps:
    probs = torch.full((1, 16, 24), base)
    for column, peak in peaks.items():
        probs[0, column, column] = peak  # each word at a pixel of its own
    return StepMaps({"c": CrossMap(SITES[1], (1, 4, 4), probs)})


def test_the_worst_subject_counts() -> None:
    control = ac.DivideBind(("cat", "dog"), bind_weight=0.0)
    state = control.begin(sampling(grid=(4, 4)))
    both = control.loss(maps_of({2: 0.5, 5: 0.5}), step(1), state).value.item()
    one = control.loss(maps_of({2: 0.5}), step(1), state).value.item()
    alone = ac.DivideBind(("dog",), bind_weight=0.0)
    dog = alone.loss(maps_of({2: 0.5}), step(1), alone.begin(sampling(grid=(4, 4)))).value.item()
    assert both < one == dog <= 0


def test_attributes_count_more_and_more() -> None:
    assert [bind_weight(step(i)) for i in (0, 9, 10, 19, 20, 49)] == [1, 1, 5, 5, 10, 10]
    free = ac.DivideBind(("dog",), pairs=(("a", "dog"),), bind_weight=0.0)
    state = free.begin(sampling("a dog", grid=(4, 4)))
    maps = maps_of({1: 0.5, 2: 0.5})
    low = free.loss(maps, step(1), state).value.item()
    values = [ac.DivideBind(("dog",)).loss(maps, step(i), state).value.item() - low for i in (1, 10, 21)]
    assert values[0] > 0
    assert values[1] == pytest.approx(5 * values[0], rel=1e-3)
    assert values[2] == pytest.approx(10 * values[0], rel=1e-3)


def test_the_variants_differ() -> None:
    maps = maps_of({1: 0.5, 2: 0.5, 5: 0.4})
    found = []
    for variant in ("paper", "code"):
        control = ac.DivideBind(pairs=(("a", "cat"), ("dog",)), variant=variant)
        found.append(control.loss(maps, step(1), control.begin(sampling(grid=(4, 4)))).value.item())
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_refinements_end_when_every_subject_varies() -> None:
    control = ac.DivideBind(("cat", "dog"))
    state = control.begin(sampling(grid=(4, 4)))
    assert [control.descent(step(i)).iterations for i in (0, 1, 10, 20)] == [51, 1, 21, 21]
    flat, peaked = maps_of({}), maps_of({2: 0.9, 5: 0.9})
    ends = [control.loss(maps, step(0), state).last for maps in (flat, peaked)]
    assert [end.tolist() for end in ends if end is not None] == [[False], [True]]
    assert control.loss(flat, step(1), state).last is None
    assert ac.DivideBind(("cat", "dog"), refinements=0).loss(peaked, step(0), state).last is None


def test_prompts_with_fewer_subjects() -> None:
    control = ac.DivideBind((("cat", "dog"), ("cat",), ()))
    state = control.begin(sampling(["a cat and a dog", "a cat", "a dog"], grid=(4, 4)))
    probs = maps_of({2: 0.5}).cross["c"].probs.repeat(3, 1, 1).requires_grad_(True)
    values = control.loss(StepMaps({"c": CrossMap(SITES[1], (1, 4, 4), probs)}), step(0), state).value
    assert values[1] < values[0]
    assert values[2].item() == 0.0
    (gradient,) = torch.autograd.grad(values.sum(), probs)
    assert torch.isfinite(gradient).all()
    assert (gradient[2] == 0).all()
