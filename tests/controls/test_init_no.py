"""InitNO against its card: scores, the search, and its loss while sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.fidelity.conflict_scores import component, otsu, overlap, scatter, subject_rows
from attnctrl.controls.fidelity.noise_search import Adam, divergence, fresh, search
from attnctrl.kernels import TokenGroups
from attnctrl.stepmaps import CrossMap, SelfMap, StepMaps, blur
from tests import tiny
from tests.methods import SITES, sampling, self_map, step
from tests.probes import Noise

D = torch.float64
GRID = (1, 4, 4)


def test_the_overlap_by_hand() -> None:
    rows = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]])
    every, two = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[True, True, False]])
    assert overlap(rows, two).item() == 0.0
    assert overlap(rows, every).item() == pytest.approx((0 + 0.25 + 0.25) / 3, abs=1e-5)
    assert overlap(rows[:, [0, 0]], two[:, :2]).item() == pytest.approx(0.5, abs=1e-5)
    assert overlap(rows, torch.tensor([[True, False, False]])).item() == 0.0  # one subject
    assert overlap(rows[:, :1], every[:, :1]).item() == 0.0


def test_rows_are_those_of_the_highest_pixel() -> None:
    matrix = torch.rand(16, 16, dtype=D, generator=torch.Generator().manual_seed(0)) + 0.1
    matrix = matrix / matrix.sum(dim=1, keepdim=True)
    found = torch.zeros(1, 2, 16)
    found[0, 0, 3], found[0, 1, 9] = 1.0, 1.0
    maps = StepMaps(self_={"s": self_map(matrix, (4, 4))})
    torch.testing.assert_close(subject_rows(maps, found, GRID), blur(matrix[None, [3, 9]].float(), GRID))
    with pytest.raises(ac.ControlError, match=r"reads self-attention on the grid .* off \(self_weight=0"):
        subject_rows(StepMaps(), found, GRID)


def test_rows_mind_heads_and_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 3, 4, 5, generator=generator)
    positions = torch.tensor([[1, 3], [0, 2]])
    for shape in ((1, 1, 1, 4), (2, 1, 4, 4)):
        mask = torch.rand(shape, generator=generator) > 0.3
        mask[..., 0] = True
        one = SelfMap(SITES[0], (1, 2, 2), query, key, mask, 0.5)
        expected = torch.stack([one.dense()[b, positions[b]] for b in range(2)])
        torch.testing.assert_close(one.rows(positions), expected)


@pytest.mark.parametrize("batch", [1, 2])
def test_rows_mind_token_groups(batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 3, 4, 5, generator=generator)
    members = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 1]], dtype=torch.bool).repeat(batch, 1, 1)
    members[-1, 3, 0] = True
    one = SelfMap(SITES[0], (1, 2, 2), query, key, TokenGroups.from_members(members), 0.5)
    positions = torch.tensor([[1, 3], [0, 2]])
    expected = torch.stack([one.dense()[b, positions[b]] for b in range(2)])
    torch.testing.assert_close(one.rows(positions), expected)
    assert one.rows(positions)[0, 0, 2] == 0


def test_otsu_parts_two_heaps() -> None:
    maps = torch.tensor([[0.1, 0.12, 0.11, 0.8, 0.85, 0.1], [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]])
    above = maps > otsu(maps)
    assert above.tolist() == [[False, False, False, True, True, False], [False, False, False, False, True, False]]
    assert torch.isfinite(otsu(torch.full((1, 6), 0.3))).all()


def picture(*rows: str) -> torch.Tensor:
    return torch.tensor([[float(c == "#") for c in "".join(rows)]])[None]


def test_a_component_is_joined_by_edges() -> None:
    mask = picture("##..", ".#.#", "..#.", "#..#") > 0
    grown = component(mask, torch.tensor([[0]]), GRID)
    assert torch.equal(grown, picture("##..", ".#..", "....", "....") > 0)
    snake = picture("###.", "..#.", "###.", "#...") > 0
    assert torch.equal(component(snake, torch.tensor([[12]]), GRID), snake)


def test_the_clean_loss_by_hand() -> None:
    valid = torch.tensor([[True, True]])
    found = torch.full((1, 2, 16), 0.1)
    found[0, 0, [0, 1]] = torch.tensor([0.9, 0.6])
    found[0, 0, 15] = 0.8  # a second place, higher than the lowest of the first
    found[0, 1, [5, 6]] = 0.9
    assert scatter(found, valid, GRID).item() == pytest.approx(0.8)
    found[0, 0, 15] = 0.55  # lower than every cell of the first: no loss
    assert scatter(found, valid, GRID).item() == 0.0
    assert scatter(torch.full((1, 2, 16), 0.3), valid, GRID).item() == 0.0  # a flat map


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    valid = torch.tensor([[True, True, True], [True, True, False]])
    rows = (torch.rand(2, 3, 5, dtype=D, generator=generator) + 0.05).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda r: overlap(r, valid), rows)
    found = torch.rand(2, 3, 16, dtype=D, generator=generator).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda f: scatter(f, valid, GRID), found)
    mean, log_var = (torch.randn(2, 6, dtype=D, generator=generator).requires_grad_(True) for _ in range(2))
    assert torch.autograd.gradcheck(divergence, (mean, log_var))


def test_the_divergence_by_hand() -> None:
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert divergence(zero, zero).item() == 0.0
    assert divergence(one, zero).item() == 0.5
    assert divergence(zero, one).item() == pytest.approx((torch.e - 2) / 2, rel=1e-5)


def test_adam_is_that_of_torch_row_by_row() -> None:
    values = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    reference = torch.nn.Parameter(values[:1].clone())
    torch_adam, adam = torch.optim.Adam([reference], lr=0.01, eps=1e-3), Adam(values, 0.01)
    moved = values
    for _ in range(3):
        reference.grad = 2 * reference.detach()
        torch_adam.step()
        moved = adam.step(moved, 2 * moved, torch.tensor([True, False]))
    torch.testing.assert_close(moved[:1], reference.detach())
    assert torch.equal(moved[1], values[1])


NOISE = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def drawn(noise: torch.Tensor = NOISE, target: float = 0.5, **more: Any) -> tuple[torch.Tensor, list[int]]:
    """A search for noise whose left half is bright, and how often the score was asked."""
    calls = [0]

    def score(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls[0] += 1
        loss = (target - z[..., :4].mean(dim=(1, 2, 3))) ** 2
        return loss, loss.detach() < 1e-4

    given = {"rounds": 2, "iterations": 3, "rate": 0.01, "limit": 1e-3} | more
    return search(noise, score, **given), calls


def loss_of(z: torch.Tensor, target: float = 0.5) -> torch.Tensor:
    return (target - z[..., :4].mean(dim=(1, 2, 3))) ** 2


def test_the_search_lowers_the_score_and_stays_gaussian() -> None:
    found, calls = drawn()
    assert calls[0] == 2 * 4 + 16
    assert (loss_of(found) < loss_of(NOISE)).all()
    count = found[0].numel()
    for picture in found:
        assert abs(picture.mean().item()) < 3 / count**0.5 + 0.045  # a divergence of 0.001 allows a mean of 0.045
        assert abs(picture.var().item() - 1) < 3 * (2 / count) ** 0.5 + 0.1
        ordered = picture.flatten().sort().values
        quantiles = torch.distributions.Normal(0, 1).icdf((torch.arange(count) + 0.5) / count)
        assert torch.corrcoef(torch.stack([ordered, quantiles]))[0, 1] > 0.99


def test_good_noise_is_kept_bit_for_bit() -> None:
    good = NOISE.clone()
    found, calls = drawn(good, target=good[0, ..., :4].mean().item())
    assert torch.equal(found[0], good[0])
    assert not torch.equal(found[1], good[1])
    alone, calls = drawn(good[:1], target=good[0, ..., :4].mean().item())
    assert torch.equal(alone, good[:1])
    assert calls[0] == 1


def test_a_picture_does_not_depend_on_its_batch() -> None:
    batch, _ = drawn()
    for i in range(3):
        torch.testing.assert_close(drawn(NOISE[i : i + 1])[0], batch[i : i + 1], atol=1e-5, rtol=1e-5)


def test_fresh_noise_repeats_with_the_seed() -> None:
    one = fresh(NOISE, 1)
    assert torch.equal(one, fresh(NOISE, 1))
    assert torch.equal(one[1:2], fresh(NOISE[1:2], 1))
    assert not torch.equal(one, fresh(NOISE, 2))
    assert not torch.equal(one[0], one[1])
    assert one.std().item() == pytest.approx(1, abs=0.1)


def test_the_control_improves_the_start() -> None:
    pipe, kept = tiny.sd(), Noise()
    with ac.control(pipe, ac.InitNO(rounds=1, iterations=3, rate=0.05, scale=0.0), kept):
        tiny.draw(pipe, steps=1)
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    assert not torch.allclose(kept.got[0], start, atol=1e-3)
    assert kept.got[0].std().item() == pytest.approx(1, abs=0.1)


def test_without_rounds_the_noise_is_the_users() -> None:
    pipe, kept = tiny.sd(), Noise()
    with ac.control(pipe, ac.InitNO(rounds=0), kept):
        tiny.draw(pipe, steps=1)
    torch.testing.assert_close(kept.got[0], torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7)))


def maps_of(**peaks: float) -> StepMaps:
    probs = torch.full((1, 16, 24), 0.001)
    probs[0, 0, 2], probs[0, 15, 5] = peaks["cat"], peaks["dog"]
    own = torch.full((16, 16), 1e-4) + torch.eye(16)
    own = own / own.sum(dim=1, keepdim=True)
    return StepMaps({"c": CrossMap(SITES[1], GRID, probs)}, {"s": self_map(own, (4, 4))})


def test_the_loss_while_sampling() -> None:
    control = ac.InitNO(("cat", "dog"))
    assert [control.descent(step(i)).iterations for i in (0, 9, 10, 20)] == [1, 1, 21, 21]
    state = control.begin(sampling(grid=(4, 4)))
    weak, strong = maps_of(cat=0.5, dog=0.01), maps_of(cat=0.5, dog=0.5)
    plain = control.loss(weak, step(9), state)
    assert plain.last is None
    joint = control.loss(weak, step(10), state)
    assert joint.last is not None
    assert joint.last.tolist() == [False]
    assert joint.value > plain.value
    done = control.loss(strong, step(10), state)
    assert done.value < joint.value


def test_the_average_decays_over_the_steps() -> None:
    control = ac.InitNO(("cat",), rounds=0)
    state = control.begin(sampling(grid=(4, 4)))
    found = [torch.full((1, 1, 16), float(i)) for i in range(3)]
    assert torch.equal(state.exchange(step(0), found[0]), found[0])
    assert torch.equal(state.exchange(step(0), found[1]), found[1])  # still nothing before this step
    torch.testing.assert_close(state.exchange(step(1), found[2]), found[1])
    torch.testing.assert_close(state.exchange(step(2), found[0]), 0.9 * found[1] + 0.1 * found[2])


def test_a_run_from_a_picture_has_no_start_noise() -> None:
    pipe = tiny.img2img()
    control = ac.InitNO(window=ac.Window(0.0, 1.0))
    with (
        pytest.raises(ac.ControlError, match=r"InitNO searches for a start noise, but .* at 0\.50.*set rounds=0"),
        ac.control(pipe, control),
    ):
        tiny.redraw(pipe)
    with ac.control(pipe, ac.InitNO(rounds=0, window=ac.Window(0.0, 1.0))) as run:
        tiny.redraw(pipe)
    assert run.losses
