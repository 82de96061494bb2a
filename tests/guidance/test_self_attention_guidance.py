"""Self-attention guidance against its card, and against diffusers' pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.guidance import self_attention_guidance
from attnctrl.controls.guidance.self_attention_guidance import blurred, degradation, received
from tests import tiny
from tests.probes import Guide
from tests.transformers import FAMILIES, draw


def test_what_keys_receive_is_the_sum_over_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 3, 7, 4, generator=generator)
    expected = (query @ key.mT * 0.5).softmax(dim=-1).mean(dim=1).sum(dim=1)
    torch.testing.assert_close(received(query, key, None, 0.5), expected)
    monkeypatch.setattr(self_attention_guidance, "PAIRS", 14)  # two queries at a time
    torch.testing.assert_close(received(query, key, None, 0.5), expected)


def test_uniform_attention_and_constant_pictures_change_nothing() -> None:
    picture = torch.randn(1, 2, 6, 9, generator=torch.Generator().manual_seed(0))
    mass = received(torch.zeros(1, 2, 54, 4), torch.zeros(1, 2, 54, 4), None, 1.0)
    assert not degradation(picture, mass, (1, 6, 9), 1.0, 9, 1.0).any()
    peaks = torch.full((1, 54), 2.0)
    assert degradation(torch.ones(1, 2, 6, 9), peaks, (1, 6, 9), 1.0, 9, 1.0).abs().max() < 1e-6
    torch.testing.assert_close(degradation(picture, peaks, (1, 6, 9), 1.0, 9, 1.0), blurred(picture, 9, 1.0) - picture)


def test_the_blur_by_hand() -> None:
    """Of one bright pixel the weights exp(-d^2 / 2) by their sum; borders are reflected."""
    line = torch.zeros(1, 1, 1, 5)
    line[..., 2] = 1.0
    near = torch.tensor(-0.5).exp()
    expected = torch.stack([torch.tensor(0.0), near, torch.tensor(1.0), near, torch.tensor(0.0)]) / (1 + 2 * near)
    torch.testing.assert_close(blurred(line, 3, 1.0)[0, 0, 0], expected)
    edge = torch.zeros(1, 1, 1, 3)
    edge[..., 1] = 1.0
    torch.testing.assert_close(blurred(edge, 3, 1.0)[0, 0, 0, 0], 2 * near / (1 + 2 * near))


def test_only_attended_parts_are_blurred() -> None:
    picture = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    mass = torch.tensor([[1.6, 0.4]])
    change = degradation(picture, mass, (1, 1, 2), 1.0, 3, 1.0)
    assert change[..., :4].abs().min() > 0
    assert not change[..., 4:].any()


@pytest.mark.parametrize("kind", ["ddim", "euler", "dpm"])
def test_the_clean_picture_is_the_inverse_of_toward(kind: str) -> None:
    got: list[Any] = []
    pipe = tiny.sd(kind)
    with ac.control(pipe, Guide(make=lambda p: (got.append(p.toward(p.clean(p.own)) - p.own), p.combined)[1])):
        tiny.draw(pipe, steps=2)
    assert max(error.abs().max() for error in got) < 1e-3


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_one_step_is_the_formula(make: Any, guidance: float) -> None:
    """The map, the blur and the further prediction made anew by the model itself."""
    pipe, got, control = make("ddim"), [], ac.SelfAttentionGuidance(scale=2.0, threshold=0.5)
    ends = [Guide(make=lambda p: (got.append(p), p.combined)[1]) for _ in range(2)]
    asked: list[Any] = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, a, k: asked.append((a, k)), with_kwargs=True)
    with ac.control(pipe, ends[0], control, ends[1]):
        tiny.draw(pipe, steps=1, size=(32, 48), guidance_scale=guidance)
    hook.remove()
    (args, kwargs), (again_args, again_kwargs) = asked[0], asked[1]
    free = got[0].own if guidance == 1.0 else got[0].uncond
    sample = (args[0] if args else kwargs["sample"])[:1]
    moved = again_args[0] if again_args else again_kwargs["sample"]
    assert moved.shape == sample.shape
    kept = pipe.scheduler.alphas_cumprod[int(pipe.scheduler.timesteps[0])]
    clean = (sample - (1 - kept).sqrt() * free) / kept.sqrt()
    # What was blurred in the clean picture is what moved in the input; parts of it stay.
    change = (moved - sample) / kept.sqrt()
    expected = blurred(clean, 9, 1.0) - clean
    blurs = change.abs() > 1e-4
    assert 0 < blurs.float().mean() <= 1
    torch.testing.assert_close(change[blurs], expected[blurs], atol=1e-2, rtol=1e-2)
    with torch.no_grad():
        degraded = pipe.unet(*again_args, **again_kwargs)[0]
    torch.testing.assert_close(got[1].combined - got[0].combined, 2.0 * (free - degraded), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "sana"])
def test_every_family(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    stock = draw(pipe, family, steps=2)
    with ac.control(pipe, ac.SelfAttentionGuidance(scale=5.0, threshold=0.5)):
        drawn = draw(pipe, family, steps=2)
    assert torch.isfinite(drawn).all()
    assert not torch.allclose(drawn, stock, atol=1e-5)
