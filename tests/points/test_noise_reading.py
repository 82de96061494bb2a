"""What the noise point may read: the maps that the first step would have from any noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import attnctrl as ac
from tests import tiny
from tests.probes import EVERYWHERE, Mask, Noise, only_first_key
from tests.spies import watched

CROSS = ac.Where(kinds=("cross",), blocks=("mid",))


@dataclass(frozen=True)
class Reads(ac.Control):
    """Reads the maps of the given noise and of its double, and keeps the noise."""

    reading: ac.Where = CROSS
    got: list = field(default_factory=list, compare=False)

    def noise(self, noise: torch.Tensor, sampling: Any, state: Any) -> torch.Tensor:
        for factor in (1.0, 2.0):
            leaf = (factor * noise).requires_grad_(True)
            with torch.enable_grad():
                maps = sampling.maps_of(leaf, self.reading)
                (probs,) = (one.probs for one in maps.cross.values())
                (gradient,) = torch.autograd.grad(probs[..., 2].sum(), leaf)
            self.got.append((probs.detach(), gradient, set(maps.self_)))
        return noise


@pytest.mark.parametrize("scheduler", tiny.PROMISED)
def test_the_maps_are_those_of_the_first_step(scheduler: str) -> None:
    pipe, control = tiny.sd(scheduler), Reads()
    expected = tiny.draw(pipe, steps=2)
    with ac.control(pipe, control, record=["cat"]) as run:
        assert torch.equal(tiny.draw(pipe, steps=2), expected)
    (own, gradient, selves), (other, _, _) = control.got
    assert own.shape == (1, 64, 24)
    assert selves == set()
    assert gradient.shape == (1, 4, 16, 16)
    assert gradient.abs().max() > 0
    assert not torch.allclose(own, other, atol=1e-3)
    # What the run records at the same site in its first step, there the mean over all sites of that grid.
    with ac.control(pipe, record=["cat"]) as run:
        tiny.draw(pipe, steps=2)
    sites = run.maps._steps[0]
    (mid,) = [maps for name, maps in sites.items() if name.startswith("mid")]
    torch.testing.assert_close(own[0, :, 2], mid[0, 0], atol=1e-5, rtol=1e-4)


def test_other_controls_act_while_it_reads() -> None:
    pipe, control = tiny.sd(), Reads()
    with ac.control(pipe, Mask(make=only_first_key), control):
        tiny.draw(pipe, steps=1)
    assert (control.got[0][0][..., 0] == 1).all()


def test_self_attention_is_read_where_it_is_asked_for() -> None:
    pipe, control = tiny.sd(), Reads(reading=ac.Where(kinds=EVERYWHERE.kinds, blocks=("mid",)))
    with ac.control(pipe, control):
        tiny.draw(pipe, steps=1)
    assert len(control.got[0][2]) == 1


@pytest.mark.parametrize("mode", ["checkpointing", "inference", "half"])
def test_the_modes_of_a_reading(mode: str) -> None:
    pipe, expected, control = tiny.sd(), Reads(), Reads()
    with ac.control(pipe, expected):
        tiny.draw(pipe, steps=1)
    if mode == "checkpointing":
        pipe.unet.enable_gradient_checkpointing()
    pipe = pipe.to(torch.bfloat16) if mode == "half" else pipe
    with torch.inference_mode(mode == "inference"), ac.control(pipe, control):
        tiny.draw(pipe, steps=1)
    for (probs, gradient, _), (known, slope, _) in zip(control.got, expected.got, strict=True):
        torch.testing.assert_close(probs, known, atol=2e-2 if mode == "half" else 1e-5, rtol=1e-4)
        if mode == "half":
            assert torch.cosine_similarity(gradient.float().flatten(), slope.flatten(), dim=0) > 0.9
        else:
            torch.testing.assert_close(gradient, slope, atol=1e-5, rtol=1e-3)


def test_inpainting_keeps_its_conditions_while_it_reads() -> None:
    pipe = tiny.inpaint()
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: tuple, kwargs: dict) -> None:
        if torch.is_grad_enabled():
            seen.append(args[0].detach())

    with ac.control(pipe, Reads()), watched(pipe) as stock:
        handle = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
        tiny.redraw(pipe, steps=2, strength=1.0)
        handle.remove()
    assert len(seen) == 2
    for sample, factor in zip(seen, (1.0, 2.0), strict=True):
        assert torch.equal(sample[:, 4:], stock.samples[0][1:, 4:])
        torch.testing.assert_close(sample[:, :4], factor * stock.samples[0][1:, :4])


def test_noise_is_chosen_within_the_window_alone() -> None:
    pipe = tiny.sd()
    control = Noise(window=ac.Window(0.5, 1.0))
    with pytest.raises(ac.ControlError, match=r"Noise acted nowhere"), ac.control(pipe, control):
        tiny.draw(pipe, steps=2)
    assert control.got == []


def test_weights_track_no_gradients_while_noise_is_read() -> None:
    pipe = tiny.sd()
    with ac.control(pipe, Reads()):
        assert not any(p.requires_grad for p in pipe.unet.parameters())
