"""Losses descended on the embeddings of tokens, and losses that end a step's descents themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.control import Descent, Loss
from tests import tiny
from tests.probes import Token
from tests.spies import COND, UNCOND, watched
from tests.transformers import FAMILIES
from tests.transformers import draw as draw_family

MID = ac.Where(blocks=("mid",))


@dataclass(frozen=True)
class Word(Token):
    """`Token`, descended on the embedding of position `at`."""

    at: int = 2

    def learned(self, state: Any) -> torch.Tensor:
        tokens = torch.zeros(1, 24, dtype=torch.bool)
        tokens[:, self.at] = True
        return tokens


def text_gradient(pipe: Any, position: int) -> torch.Tensor:
    """The gradient of `Token`'s loss by the conditional text of the first step, by finite differences of the loss."""
    with ac.control(pipe, Token(position=position, where=MID, scale=1e-12)), watched(pipe) as seen:
        tiny.draw(pipe, steps=1)
    embeddings = seen.texts[0][COND]

    def value(text: torch.Tensor) -> float:
        def shifted(module: Any, args: tuple, kwargs: dict) -> Any:
            new = kwargs["encoder_hidden_states"].clone()
            new[-1:] = text
            return args, {**kwargs, "encoder_hidden_states": new}

        handle = pipe.unet.register_forward_pre_hook(shifted, with_kwargs=True)
        try:
            # The smallest descent records the loss of the text that the hook hands on.
            with ac.control(pipe, Token(position=position, where=MID, scale=1e-12)) as run:
                tiny.draw(pipe, steps=1)
        finally:
            handle.remove()
        return run.losses[0].values[0]

    gradient = torch.zeros(embeddings.shape[-1])
    for channel in range(4):
        step = torch.zeros_like(embeddings)
        step[0, 2, channel] = 0.5
        gradient[channel] = value(embeddings + step) - value(embeddings - step)
    return gradient


def test_the_embedding_moves_down_the_gradient() -> None:
    pipe = tiny.sd()
    expected = text_gradient(pipe, 2)
    with ac.control(pipe), watched(pipe) as stock:
        tiny.draw(pipe, steps=1)
    with ac.control(pipe, Word(scale=1000.0, where=MID)), watched(pipe) as seen:
        tiny.draw(pipe, steps=1)
    moved = (seen.texts[0] - stock.texts[0])[COND][0]
    torch.testing.assert_close(moved[2, :4], -1000.0 * expected[:4], atol=2e-2, rtol=5e-2)
    assert moved[2].abs().max() > 0.05
    moved[2] = 0
    assert (moved == 0).all()
    assert torch.equal(seen.texts[0][UNCOND], stock.texts[0][UNCOND])
    assert torch.equal(seen.samples[0], stock.samples[0])


def test_what_was_learned_stays_and_grows() -> None:
    pipe, control = tiny.sd(), Word(scale=1000.0, iterations=2, where=MID, window=ac.Window(0.0, 0.5))
    with ac.control(pipe), watched(pipe) as stock:
        tiny.draw(pipe, steps=4)
    with ac.control(pipe, control) as run, watched(pipe) as seen:
        tiny.draw(pipe, steps=4)
    moves = [(a - b)[COND][0, 2] for a, b in zip(seen.texts, stock.texts, strict=True)]
    assert len(run.losses) == 4
    assert not torch.equal(moves[0], moves[1])
    assert torch.equal(moves[1], moves[2])  # behind the window
    assert torch.equal(moves[1], moves[3])
    values = [loss.values[0] for loss in run.losses]
    assert values[1] < values[0]
    with ac.control(pipe), watched(pipe) as after:  # and nothing outlives the sampling
        tiny.draw(pipe, steps=1)
    assert torch.equal(after.texts[0], stock.texts[0])


def test_words_and_latents_each_follow_their_own_loss() -> None:
    pipe = tiny.sd()
    latents, words = Token(position=5, scale=1000.0, where=MID), Word(scale=1000.0, where=MID)
    seen = {}
    for name, controls in {"none": (), "latents": (latents,), "words": (words,), "both": (latents, words)}.items():
        with ac.control(pipe, *controls), watched(pipe) as spy:
            tiny.draw(pipe, steps=1)
        seen[name] = spy
    torch.testing.assert_close(seen["both"].samples[0], seen["latents"].samples[0])
    torch.testing.assert_close(seen["both"].texts[0], seen["words"].texts[0])
    assert not torch.equal(seen["both"].samples[0], seen["none"].samples[0])
    assert not torch.equal(seen["both"].texts[0], seen["none"].texts[0])


def test_two_losses_on_words_move_those_that_each_names() -> None:
    pipe = tiny.sd()
    one, two = Word(position=2, at=2, scale=1000.0, where=MID), Word(position=5, at=5, scale=1000.0, where=MID)
    texts = []
    for controls in ((one,), (two,), (one, two)):
        with ac.control(pipe, *controls), watched(pipe) as spy:
            tiny.draw(pipe, steps=1)
        texts.append(spy.texts[0][COND][0])
    torch.testing.assert_close(texts[2][2], texts[0][2])
    torch.testing.assert_close(texts[2][5], texts[1][5])


@dataclass(frozen=True)
class Steady(Word):
    """`Word`, by Adam."""

    def descent(self, step: Any) -> Descent:
        return Descent(self.scale, self.iterations, adam=True)


@dataclass(frozen=True)
class OnLatents(Steady):
    def learned(self, state: Any) -> None:
        return None


def test_adam_moves_by_its_rate_and_remembers() -> None:
    pipe = tiny.sd()
    with ac.control(pipe), watched(pipe) as stock:
        tiny.draw(pipe, steps=2)
    with ac.control(pipe, Steady(scale=0.25, sign=1000.0, where=MID)) as run, watched(pipe) as seen:
        tiny.draw(pipe, steps=2)
    moves = [(a - b)[COND][0, 2] for a, b in zip(seen.texts, stock.texts, strict=True)]
    torch.testing.assert_close(moves[0].abs(), torch.full((16,), 0.25), atol=1e-2, rtol=0)
    assert run.sampling is not None
    torch.testing.assert_close(run.sampling.words[0, 2], moves[1])  # type: ignore[index]
    assert run.sampling.moments[0].count == 2
    with pytest.raises(ac.ControlError, match="asks for Adam on the latents"), ac.control(pipe, OnLatents(scale=1.0)):
        tiny.draw(pipe, steps=1)


@pytest.mark.parametrize("mode", ["checkpointing", "inference"])
def test_the_modes_of_a_loss(mode: str) -> None:
    pipe = tiny.sd("euler")
    control = Word(scale=1000.0, iterations=2)
    with ac.control(pipe, control):
        expected = tiny.draw(pipe, steps=2)
    if mode == "checkpointing":
        pipe.unet.enable_gradient_checkpointing()
    with torch.inference_mode(mode == "inference"), ac.control(pipe, control):
        torch.testing.assert_close(tiny.draw(pipe, steps=2), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart"])
def test_transformers_learn_words_too(name: str) -> None:
    family = FAMILIES[name]

    @dataclass(frozen=True)
    class First(Token):
        def begin(self, sampling: Any) -> torch.Tensor:
            return torch.ones(1, sampling.text_tokens, dtype=torch.bool)

        def learned(self, state: Any) -> torch.Tensor:
            return state

    pipe = family.make()
    stock = draw_family(pipe, family, steps=2)
    with ac.control(pipe, First(scale=100.0, iterations=2)) as run:
        drawn = draw_family(pipe, family, steps=2)
    assert not torch.allclose(drawn, stock, atol=1e-4)
    values = [loss.values[0] for loss in run.losses if loss.step == 0]
    assert values[1] < values[0]


@dataclass(frozen=True)
class Ends(Token):
    """Every picture's first move is the step's last, but for the second picture."""

    def loss(self, maps: Any, step: Any, state: Any) -> Loss:
        loss = super().loss(maps, step, state)
        return Loss(loss.value, last=torch.arange(len(loss.value)) != 1)


def test_a_last_move_is_made_and_no_other() -> None:
    pipe = tiny.sd()
    inputs = []
    for control in (Token(scale=2000.0, iterations=1), Ends(scale=2000.0, iterations=3)):
        with ac.control(pipe, control) as run, watched(pipe) as seen:
            tiny.draw(pipe, steps=1, num_images_per_prompt=2)
        inputs.append(seen.samples[0])
    torch.testing.assert_close(inputs[1][0], inputs[0][0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(inputs[1][1], inputs[0][1], atol=1e-2)
    assert len(run.losses) == 3


def test_when_all_moves_were_the_last_the_step_goes_on() -> None:
    pipe = tiny.sd()
    with ac.control(pipe, Ends(scale=2000.0, iterations=5)) as run:
        tiny.draw(pipe, steps=1)
    assert len(run.losses) == 1  # no further pass is spent on finding out
