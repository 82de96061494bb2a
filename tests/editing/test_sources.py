"""What keeps the source of an edit: trajectories, virtual inversion, its guidance, blending."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import attnctrl as ac
from attnctrl.controls.editing.virtual_inversion import transferred
from attnctrl.reversed_flow import ReversedFlow
from tests import tiny
from tests.editing.material import EDIT, SOURCE, draw
from tests.joint_models import on_joint_models
from tests.parts import Tiny
from tests.transformers import draw as draw_joint


def clean(seed: int = 9) -> torch.Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_transfer_is_flow_edit_with_one_noise() -> None:
    """Euler steps of the transferred velocity move the edit's distance to the noised source by dt (v_t - v_s)."""
    source, noise = torch.tensor([0.7]), torch.tensor([-1.1])
    sigmas = [1.0, 0.6, 0.25, 0.0]

    def velocity(z: torch.Tensor, text: float) -> torch.Tensor:
        return torch.sin(3 * z) + text

    by_hand = source.clone()
    edit = noise.clone()
    for now, then in itertools.pairwise(sigmas):
        noised = (1 - now) * source + now * noise
        by_hand = by_hand + (then - now) * (velocity(by_hand + noised - source, 0.4) - velocity(noised, 0.1))
        known = noise - source
        edit = edit + (then - now) * transferred(velocity(edit, 0.4), velocity(noised, 0.1), known)
    torch.testing.assert_close(edit, by_hand)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm", "lcm"])
def test_virtual_inversion_gives_the_source_exactly(scheduler: str) -> None:
    pipe, source = tiny.sd(scheduler), clean()
    seeds = [torch.Generator().manual_seed(4) for _ in range(2)]
    control = ac.VirtualInversion(source)
    same = draw(pipe, [SOURCE, SOURCE], control, latents=None, generator=seeds)
    torch.testing.assert_close(same, source.expand(2, -1, -1, -1), atol=1e-4, rtol=1e-4)
    assert torch.equal(same[0], source[0])
    seeds = [torch.Generator().manual_seed(4) for _ in range(2)]
    other = draw(pipe, [SOURCE, EDIT], control, latents=None, generator=seeds)
    assert torch.equal(other[0], source[0])
    assert not torch.allclose(other[1], source[0], atol=1e-3)


@on_joint_models
def test_virtual_inversion_on_flows(family: Tiny) -> None:
    pipe = family.make()
    source = draw_joint(pipe, family, generator=torch.Generator().manual_seed(2))

    def edited(prompt: str, start: float = 0.0) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
        with ac.control(pipe, ac.VirtualInversion(source, start=start), record=False):
            return draw_joint(pipe, family, [SOURCE, prompt], generator=seeds)

    torch.testing.assert_close(edited(SOURCE)[1], source[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(edited(EDIT)[0], source[0])
    assert not torch.allclose(edited(EDIT)[1], source[0], atol=1e-3)
    torch.testing.assert_close(edited(EDIT, start=1.0)[1], source[0], atol=1e-4, rtol=1e-4)


def test_following_a_trajectory() -> None:
    pipe = tiny.sd()
    path = torch.stack([clean(seed) for seed in range(4)])
    alone = draw(pipe, [SOURCE, EDIT], ac.FollowSource(path))
    assert torch.equal(alone[0], path[-1, 0])
    shared = draw(pipe, [SOURCE, SOURCE], ac.FollowSource(path, shared=True))
    torch.testing.assert_close(shared[1], path[-1, 0], atol=1e-5, rtol=1e-5)
    late = draw(pipe, [SOURCE, EDIT], ac.FollowSource(path, start=1.0))
    assert torch.equal(late[1], path[-1, 0])


def test_following_refuses_what_does_not_fit() -> None:
    with pytest.raises(ac.ControlError, match="trajectory of 1 steps, and the run has 3"):
        draw(tiny.sd(), [SOURCE, EDIT], ac.FollowSource(torch.stack([clean(), clean()])))
    with pytest.raises(ac.ControlError, match="invert at the size of the run"):
        draw(tiny.sd(), [SOURCE, EDIT], ac.FollowSource(torch.zeros(4, 1, 4, 8, 8)))


def test_the_source_has_its_own_guidance() -> None:
    pipe = tiny.sd()
    plain, guided = draw(pipe, [SOURCE, EDIT], guidance_scale=1.0), draw(pipe, [SOURCE, EDIT], guidance_scale=4.0)
    both = draw(pipe, [SOURCE, EDIT], ac.SourceGuidance(scale=1.0), guidance_scale=4.0)
    torch.testing.assert_close(both[0], plain[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(both[1], guided[1])


def test_blending_keeps_what_is_outside() -> None:
    area = np.zeros((32, 32), np.uint8)
    area[:, :14] = 255  # 7 columns of latents
    edited = draw(tiny.sd(), [SOURCE, EDIT], ac.SourceBlend(area))
    assert torch.equal(edited[1, :, :, 7:], edited[0, :, :, 7:])
    assert not torch.isclose(edited[1, :, :, :7], edited[0, :, :, :7]).all()


@pytest.mark.parametrize(
    "control",
    [
        ac.VirtualInversion(),
        ac.FollowSource(),
        ac.SourceBlend(),
        ac.TowardPicture(),
        ac.TowardPicture(clean(), strength=0.0),
        ac.TowardNoise(),
        ac.VirtualInversion(clean(), window=ac.Window(1, 1)),
    ],
)
def test_asked_for_nothing_they_are_idle(control: ac.Control) -> None:
    pipe = tiny.sd()
    assert control.idle
    assert torch.equal(draw(pipe, [SOURCE, EDIT], control), draw(pipe, [SOURCE, EDIT]))


@on_joint_models
def test_flows_led_to_a_picture_or_a_noise(family: Tiny) -> None:
    """Led all the way, a flow ends in what it was led to, whatever the model says."""
    pipe = family.make()
    source = draw_joint(pipe, family, generator=torch.Generator().manual_seed(2))
    with ac.control(pipe, ac.TowardPicture(source, strength=1.0, window=ac.Window()), record=False):
        torch.testing.assert_close(draw_joint(pipe, family), source, atol=1e-4, rtol=1e-4)
    stock = draw_joint(pipe, family)
    with ac.control(pipe, ac.TowardPicture(source, strength=0.5, window=ac.Window()), record=False):
        led = draw_joint(pipe, family)
    assert (led - source).abs().mean() < (stock - source).abs().mean()
    scheduler, pipe.scheduler = pipe.scheduler, ReversedFlow.from_config(pipe.scheduler.config)
    wanted = ac.TowardNoise(source, seed=3, strength=1.0)
    with ac.control(pipe, wanted, record=False) as run:
        ended = draw_joint(pipe, family)
    assert run.sampling is not None
    pictures = run.family.unpacked(ended, run.sampling.latent_grid)
    torch.testing.assert_close(pictures, wanted.ends_in(pictures), atol=1e-4, rtol=1e-4)
    pipe.scheduler = scheduler
