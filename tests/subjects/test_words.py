"""Words learned from pictures."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from attnctrl.pipelines import SubjectsPipeline
from attnctrl.words import learn_word, learn_words
from tests import tiny
from tests.subjects.material import PROMPT, middle, picture


def cat() -> ac.Subject:
    return ac.Subject("cat", [picture(1), picture(2)], [middle()] * 2, prompt="a red cat")


def test_a_word_is_learned_and_the_model_stays() -> None:
    pipe = tiny.sd()
    before = [p.clone() for p in pipe.unet.parameters()]
    grads = [p.requires_grad for p in pipe.unet.parameters()]
    text, _ = pipe.encode_prompt("a red cat", "cpu", 1, False)
    assert torch.equal(learn_word(pipe, cat(), steps=0), text[0, 3])
    word = learn_word(pipe, cat(), steps=3, rate=0.1)
    assert word.shape == (16,)
    # Adam's steps are about as long as its rate.
    assert 0.1 < float((word - text[0, 3]).abs().max()) < 0.4
    assert torch.equal(word, learn_word(pipe, cat(), steps=3, rate=0.1))
    assert not torch.equal(word, learn_word(pipe, cat(), steps=3, rate=0.1, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(before, pipe.unet.parameters(), strict=True))
    assert grads == [p.requires_grad for p in pipe.unet.parameters()]
    assert all(p.grad is None for p in pipe.unet.parameters())


def test_the_pipeline_learns_them() -> None:
    pipe = tiny.sd()
    words = learn_words(pipe, [cat()], seed=4)
    made = SubjectsPipeline(pipe)
    few = {"num_inference_steps": 2, "seed": 4, "record": False, "output_type": "latent"}
    named = made(PROMPT, [cat()], method="delayed-subject", delay=0.0, **few)
    given = made(PROMPT, [cat()], method=ac.DelayedSubject(words, delay=0.0), **few)
    assert torch.equal(named.images[0], given.images[0])
    stock = made(PROMPT, [cat()], method="none", **few)
    assert not torch.allclose(named.images[0], stock.images[0], atol=1e-4)


def test_models_that_cannot_learn_say_so() -> None:
    with pytest.raises(ac.ControlError, match="StableDiffusionXLPipeline cannot be learned"):
        learn_word(tiny.sdxl(), cat())
