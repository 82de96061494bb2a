"""Bundled attention against its card."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.fidelity.bundled_attention import bundling
from attnctrl.stepmaps import CrossMap, StepMaps
from tests import tiny
from tests.methods import SITES, sampling, step

D = torch.float64


def pairs(*bound: tuple[int, int], words: int = 3) -> torch.Tensor:
    out = torch.zeros(1, words, words, dtype=torch.bool)
    for noun, attribute in bound:
        out[0, noun, attribute] = True
    return out


def test_the_distance_by_hand() -> None:
    maps = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]])
    assert bundling(maps, pairs((0, 1))).item() == 0.0
    assert bundling(maps, pairs((0, 2))).item() == 1.0
    assert bundling(maps, pairs((0, 1), (0, 2))).item() == 0.5
    half = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]])
    assert bundling(half, pairs((0, 1))).item() == pytest.approx(1 - 0.5**0.5)
    assert bundling(maps, pairs()).item() == 0.0  # single words have nothing to be bundled with


def test_the_gradient_is_that_of_finite_differences() -> None:
    maps = torch.rand(1, 3, 5, dtype=D, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda m: bundling(m, pairs((0, 1), (0, 2))), maps)
    (gradient,) = torch.autograd.grad(bundling(torch.zeros_like(maps) * maps, pairs((0, 1))).sum(), maps)
    assert torch.isfinite(gradient).all()


def test_the_loss_of_the_control() -> None:
    control = ac.BundledAttention()
    state = control.begin(sampling(["a red cat and the bird", "a cat"], grid=(4, 4)))
    probs = torch.full((2, 16, 24), 0.001)
    probs[:, 0, 3], probs[:, 15, 2] = 0.5, 0.5  # cat and red in opposite corners
    maps = StepMaps({"c": CrossMap(SITES[1], (1, 4, 4), probs)})
    apart = control.loss(maps, step(0), state).value
    assert apart[0] > 0.3
    assert apart[1] == 0  # no attribute in this prompt
    probs[:, 15, 2], probs[:, 0, 2] = 0.001, 0.5
    assert control.loss(maps, step(0), state).value[0] < 1e-5


def test_a_descent_bundles() -> None:
    pipe, prompt = tiny.sd(), "a red cat and the bird"
    control = ac.BundledAttention(scale=100.0, iterations=5, window=ac.Window(0.0, 0.1))
    with ac.control(pipe, control) as run:
        tiny.draw(pipe, prompt, steps=1)
    values = [loss.values[0] for loss in run.losses]
    assert len(values) == 5
    assert values[-1] < values[0]


def test_a_prompt_without_attributes_is_refused() -> None:
    pipe = tiny.sd()
    with (
        pytest.raises(ac.ControlError, match=r"found no attribute of any noun in the prompt: name them with pairs="),
        ac.control(pipe, ac.BundledAttention()),
    ):
        tiny.draw(pipe)
