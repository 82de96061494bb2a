"""Every transformer family: the points of the sampling loop mean there what they mean everywhere."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl import descend
from attnctrl.kernels import probabilities
from attnctrl.sites import Call
from tests import tiny
from tests.parity.test_families import ALL, EVERY, close, denoisers, every_family
from tests.parts import Tiny
from tests.probes import Context, Guide, Inputs, Latents, Noise, Output, Token
from tests.transformers import draw


@every_family
def test_latents_and_noise_are_pictures(family: Tiny) -> None:
    pipe, latents, noise = family.make(), Latents(), Noise()
    with ac.control(pipe, noise):
        expected = draw(pipe, family)
    with ac.control(pipe, latents, noise):
        drawn = draw(pipe, family)
    frames, height, width = family.grid
    for tensor in (noise.got[0], latents.got[0][1]):
        assert tensor.ndim == (4 if frames == 1 else 5)
        assert tensor.shape[-2] % height == 0
        assert tensor.shape[-1] / width == tensor.shape[-2] / height
    assert noise.got[0].std() == pytest.approx(1, abs=0.1)
    assert drawn.shape == expected.shape
    drawn = drawn[:, :, 1:] if family.given_frame else drawn
    # FLUX.2 klein undoes its autoencoder's normalisation on the way out.
    close(drawn, torch.full_like(drawn, 2.0))


@every_family
def test_noise_is_where_the_pipeline_begins(family: Tiny) -> None:
    """Noise flipped left to right in the control equals noise handed to the pipeline flipped."""
    pipe = family.make()
    stock = draw(pipe, family)
    with ac.control(pipe, Noise(edit=lambda noise: noise)):
        assert torch.equal(draw(pipe, family), stock)
    got = Noise(edit=lambda noise: -noise)
    with ac.control(pipe, got):
        flipped = draw(pipe, family)
    assert not torch.allclose(flipped, stock, atol=1e-3)


@pytest.mark.parametrize("name", [name for name, family in EVERY.items() if family.condition])
def test_what_the_pipeline_is_given_stays_as_it_is(name: str) -> None:
    """Noise and losses move the latents; the channels or frames of a given picture are none."""
    family = EVERY[name]
    pipe, inputs = family.make(), []

    def keep(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            inputs.append(kwargs["hidden_states"])

    controls = Noise(edit=lambda noise: -noise), Token(scale=20.0)
    for used in ((), controls):
        with ac.control(pipe, *used):
            handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
            draw(pipe, family, steps=2, free=True)
            handle.remove()
    stock, _, moved, _ = inputs
    assert torch.equal(family.condition(moved), family.condition(stock))
    changed = (moved != stock).sum()
    assert changed > 0.9 * (stock.numel() - family.condition(stock).numel())


@every_family
@pytest.mark.parametrize("free", [False, True])
def test_guide_gets_and_gives_pictures(family: Tiny, free: bool) -> None:
    pipe, answers = family.make(), []
    guide = Guide(make=lambda prediction: (answers.append(prediction.again(None)), prediction.combined)[1])
    expected = draw(pipe, family, free=free)
    with ac.control(pipe, guide):
        assert torch.equal(draw(pipe, family, free=free), expected)
    prediction = guide.got[0]
    assert (prediction.uncond is None) == (free or family.unguided)
    scales = [v for n, v in family.guided.items() if n.endswith("scale")]
    if prediction.uncond is not None and not family.rescaled:
        assert prediction.scale == pytest.approx(scales[0] + family.plus, rel=1e-3)
    close(answers[0], prediction.cond)


@every_family
def test_words_are_embedded_where_they_are_found(family: Tiny) -> None:
    """Another word in the prompt changes the text most at the positions of the word that it replaces."""
    pipe, context = family.make(), Context(by=0.0)
    with ac.control(pipe, context) as run:
        draw(pipe, family, steps=2)  # Mochi's schedule needs two
        again, other = run.sampling.encode([tiny.PROMPT, tiny.PROMPT.replace("dog", "bird")]).positive
    close(again[None], context.got[0].positive)
    moved = (again - other).norm(dim=-1)
    positions = run.sampling.find("dog")
    assert moved.argmax().item() in positions
    assert all(moved[position] > moved.mean() for position in positions)


@every_family
def test_the_context_point_changes_the_text(family: Tiny) -> None:
    pipe = family.make()
    expected = draw(pipe, family)
    with ac.control(pipe, Context(by=0.0)):
        assert torch.equal(draw(pipe, family), expected)
    with ac.control(pipe, Context(by=1.0)):
        assert not torch.allclose(draw(pipe, family), expected, atol=1e-3)


@every_family
@pytest.mark.parametrize("free", [False, True])
def test_losses_move_the_latents(family: Tiny, free: bool) -> None:
    """The gradient by the latents comes through every layer, and checkpointing does not change it."""
    pipe = family.make()
    expected, drawn = draw(pipe, family, free=free), []
    for checkpointed in (False, True):
        if checkpointed:
            pipe.transformer.enable_gradient_checkpointing()
        with ac.control(pipe, Token(scale=100.0)) as run:
            drawn.append(draw(pipe, family, free=free))
        assert len(run.losses) == 3
    assert not torch.allclose(drawn[0], expected, atol=1e-3)
    close(drawn[1], drawn[0])


@every_family
def test_maps_are_of_the_picture_and_of_the_phrase(family: Tiny) -> None:
    """In joint attention too a recorded map is what the latent tokens see of a phrase's text tokens."""
    pipe, seen = family.make(), {}
    frames, height, width = family.grid

    def keep(call: Call) -> Call:
        probs = probabilities(call.query, call.key, call.mask, call.scale)
        if call.step.index == 0:
            seen[call.site.name] = probs[:, :, call.queries.latent, call.keys.text].mean(dim=1)
        return call

    watching = Inputs(edit=keep, where=ac.Where())
    expected = draw(pipe, family, steps=2)
    with ac.control(pipe, record=["dog"]) as run:
        assert torch.equal(draw(pipe, family, steps=2), expected)
    assert run.maps["dog"].shape == ((2, frames, height, width) if frames > 1 else (2, height, width))
    with ac.control(pipe, watching, record=["dog"]) as run:
        draw(pipe, family, steps=2)
    assert len(seen) * family.experts == len([s for s in run.sampling.sites if s.kind != "self"])
    positions = list(run.sampling.find("dog"))
    mean = torch.stack([seen[name][0][:, positions].mean(dim=1) for name in sorted(seen)]).mean(dim=0)
    close(run.maps["dog"][0].flatten(), mean)


@every_family
def test_a_loss_moves_the_latents_to_less_of_it(family: Tiny) -> None:
    pipe = family.make()
    expected = draw(pipe, family, steps=2)
    with ac.control(pipe, Token(sign=-1.0, scale=20.0, iterations=3)) as run:
        drawn = draw(pipe, family, steps=2)
    assert not torch.allclose(drawn, expected, atol=1e-4)
    values = [loss.values[0] for loss in run.losses if loss.step == 0]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


@every_family
def test_checkpointing_in_autograds_own_thread(family: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the backward pass, and with it the recomputation, runs in a thread that knows no context variable."""
    pipe = family.make()
    controls = Token(scale=20.0), Output(edit=lambda output: output * 1.1, where=ALL)
    with ac.control(pipe, *controls):
        expected = draw(pipe, family, steps=2)
    for denoiser in denoisers(pipe):
        denoiser.enable_gradient_checkpointing()
    stock, threads = descend._gradient, []

    def elsewhere(*args: Any) -> torch.Tensor:
        results: list[torch.Tensor] = []
        threads.append(threading.Thread(target=lambda: results.append(stock(*args))))
        threads[-1].start()
        threads[-1].join()
        return results[0]

    monkeypatch.setattr(descend, "_gradient", elsewhere)
    with ac.control(pipe, *controls):
        close(draw(pipe, family, steps=2), expected)
    assert threads
