"""FastComposer's delayed conditioning against its card."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.subjects.delayed_subject import personalised
from tests import tiny
from tests.spies import COND, UNCOND, watch

EMBEDDING = torch.linspace(-3, 3, 16)


def test_the_last_tokens_are_replaced() -> None:
    text = torch.arange(12.0).view(4, 3)
    changed = personalised(text, (1, 2), torch.tensor([[9.0, 8.0, 7.0]]))
    assert changed.tolist() == [[0, 1, 2], [3, 4, 5], [9, 8, 7], [9, 10, 11]]


def test_the_same_embedding_is_no_change_for_any_delay() -> None:
    pipe = tiny.sd()
    text, _ = pipe.encode_prompt(tiny.PROMPT, "cpu", 1, False)
    stock = tiny.draw(pipe)
    for delay in (0.0, 0.5):
        with ac.control(pipe, ac.DelayedSubject({"cat": text[0, 2]}, delay=delay), record=False):
            torch.testing.assert_close(tiny.draw(pipe), stock, atol=1e-5, rtol=1e-5)


def test_only_the_conditional_half_and_only_after_the_delay() -> None:
    pipe = tiny.sd()
    stock = watch(pipe, steps=4)
    seen = watch(pipe, ac.DelayedSubject({"cat": EMBEDDING}, delay=0.5), steps=4)
    for step in (0, 1):
        assert torch.equal(seen.predictions[step], stock.predictions[step])
    assert not torch.allclose(seen.predictions[2][COND], stock.predictions[2][COND], atol=1e-4)
    torch.testing.assert_close(seen.predictions[2][UNCOND], stock.predictions[2][UNCOND], atol=1e-5, rtol=1e-5)


def test_without_a_delay_it_is_the_augmented_prompt() -> None:
    pipe = tiny.sd()
    text, _ = pipe.encode_prompt(tiny.PROMPT, "cpu", 1, False)
    augmented = personalised(text[0], (2,), EMBEDDING[None])[None]
    empty, _ = pipe.encode_prompt("", "cpu", 1, False)
    wanted = tiny.draw(pipe, None, prompt_embeds=augmented, negative_prompt_embeds=empty)
    with ac.control(pipe, ac.DelayedSubject({"cat": EMBEDDING}, delay=0.0), record=False):
        torch.testing.assert_close(tiny.draw(pipe), wanted, atol=1e-4, rtol=1e-4)


def test_asked_for_nothing_it_is_the_stock_run() -> None:
    pipe = tiny.sd()
    for control in (ac.DelayedSubject(), ac.DelayedSubject({"cat": EMBEDDING}, delay=1.0)):
        assert control.idle
        with ac.control(pipe, control, record=False):
            assert torch.equal(tiny.draw(pipe), tiny.draw(pipe))


@pytest.mark.parametrize("shape", [(3,), (2, 16), (0, 16), (1, 1, 16)])
def test_embeddings_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    pipe = tiny.sd()
    with (
        pytest.raises(ac.ControlError, match="which is 1 tokens of 16 channels"),
        ac.control(pipe, ac.DelayedSubject({"cat": torch.zeros(shape)}), record=False),
    ):
        tiny.draw(pipe)
