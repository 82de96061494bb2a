"""Attend-and-Excite against its card."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.fidelity.attend_excite import excited_maps, neglect
from attnctrl.stepmaps import CrossMap, StepMaps
from attnctrl.subjects import Subjects
from tests.methods import SITES, sampling, step

D = torch.float64
BOTH = torch.tensor([[True, True]])
INNER = torch.tensor([[False, True, True, False]])


def test_the_worst_subject_counts() -> None:
    maps = torch.tensor([[[0.1, 0.9, 0.3], [0.2, 0.4, 0.35]]])
    assert neglect(maps, BOTH).item() == pytest.approx(0.6)
    assert neglect(maps, torch.tensor([[True, False]])).item() == pytest.approx(0.1)
    assert neglect(maps, torch.tensor([[False, False]])).item() == 0.0


def test_full_attention_somewhere_is_no_loss() -> None:
    assert neglect(torch.tensor([[[0.0, 1.0], [1.0, 0.2]]]), BOTH).item() == 0.0


def test_the_gradient_is_that_of_finite_differences() -> None:
    maps = torch.rand(2, 3, 5, dtype=D, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    assert torch.autograd.gradcheck(lambda m: neglect(m, valid), maps)


def maps_of(probs: torch.Tensor, grid: tuple[int, int]) -> StepMaps:
    return StepMaps({"c": CrossMap(SITES[1], (1, *grid), probs)})


def test_the_gradient_reaches_the_neighbourhood_of_the_highest_pixel_alone() -> None:
    """The card: two words share the attention; the map's peak is in the middle of 5 x 5 pixels."""
    probs = torch.zeros(1, 25, 4)
    probs[..., 1], probs[..., 2] = 0.010, 0.012
    probs[0, 12, 1] = 0.02
    leaf = probs.requires_grad_(True)
    subjects = Subjects(torch.tensor([[[False, True, False, False]]]), INNER)
    loss = neglect(excited_maps(maps_of(leaf, (5, 5)), subjects), torch.tensor([[True]]))
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    touched = (gradient.abs().sum(dim=-1) > 0).reshape(5, 5)
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[1:4, 1:4] = True
    assert torch.equal(touched, expected)
    assert (gradient[..., 1][0, expected.flatten()] < 0).all()  # more attention, less loss


def test_the_maps_by_hand() -> None:
    """Shares of a uniform picture: softmax(100 A) over the words between the first and the last position."""
    probs = torch.tensor([0.9, 0.02, 0.03, 0.05]).expand(1, 4, 4)
    tokens = torch.tensor([[[False, True, False, False], [False, True, True, False]]])
    found = excited_maps(maps_of(probs, (2, 2)), Subjects(tokens, INNER))
    shares = torch.tensor([2.0, 3.0]).softmax(dim=0)
    torch.testing.assert_close(found[0, 0], shares[0].expand(4))
    torch.testing.assert_close(found[0, 1], torch.full((4,), 0.5))  # the mean over a phrase's tokens


def test_the_step_size_is_the_authors() -> None:
    """20 * sqrt(linspace(1, 0.5, 50)): 20 at the start, 14.14 at the end."""
    control = ac.AttendExcite(("cat",))
    scales = torch.tensor([control.descent(step(i)).scale for i in range(50)])
    expected = 20 * torch.linspace(1, 0.5, 51)[:50].sqrt()  # the end of the run is not a step
    torch.testing.assert_close(scales, expected)
    assert control.window == ac.Window(0.0, 0.5)


def test_the_loss_of_the_control() -> None:
    control = ac.AttendExcite(("cat", "a dog"))
    state = control.begin(sampling(grid=(2, 2), images=2))
    assert state.tokens.shape == (2, 2, 24)
    assert state.contenders.nonzero().tolist() == [[row, i] for row in (0, 1) for i in range(1, 23)]
    assert state.tokens[0].nonzero().tolist() == [[0, 2], [1, 4], [1, 5]]
    probs = torch.full((2, 4, 24), 0.01)
    probs[1, 0, [2, 4, 5]] = 0.5
    loss = control.loss(maps_of(probs, (2, 2)), step(0), state)
    assert loss.value.shape == (2,)
    assert loss.value[0].item() == pytest.approx(1 - 1 / 22, abs=1e-5)  # 22 words and paddings share alike
    assert loss.value[1] < loss.value[0]
