"""Words learned from pictures."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from attnctrl import shapes
from attnctrl.bench.subject_tasks import make_subject_tasks
from attnctrl.pipelines import SubjectsPipeline
from attnctrl.shapes.world import COLOURS
from attnctrl.words import find_word, learn_word, words_for
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
    words = {phrase: word.embedding for phrase, word in words_for(pipe, [cat()], seed=4).items()}
    made = SubjectsPipeline(pipe)
    few = {"num_inference_steps": 2, "seed": 4, "record": False, "output_type": "latent"}
    named = made(PROMPT, [cat()], method="delayed-subject", delay=0.0, **few)
    given = made(PROMPT, [cat()], method=ac.DelayedSubject(words, delay=0.0), **few)
    assert torch.equal(named.images[0], given.images[0])
    stock = made(PROMPT, [cat()], method="none", **few)
    assert not torch.allclose(named.images[0], stock.images[0], atol=1e-4)
    found = made(PROMPT, [cat()], method="delayed-subject", delay=0.0, words="found", among=["red"], **few)
    assert not torch.allclose(found.images[0], named.images[0], atol=1e-4)
    assert named.words == stock.words == {}
    assert found.words.keys() == {"cat"}
    said = {"red": 'cat: found "red"', "": "cat: no word fits better than none"}
    assert found.report == f"{found.run.report}\n{said[found.words['cat']]}"


def test_a_word_is_found_among_others_without_gradients() -> None:
    pipe = tiny.sd()
    with torch.inference_mode():
        word, embedding = find_word(pipe, cat(), among=["dog"])
    # One word and none: after "a red", the phrase's noun is read behind the word.
    texts = {"dog": "a red dog cat", "": "a red cat"}
    text, _ = pipe.encode_prompt(texts[word], "cpu", 1, False)
    assert torch.equal(embedding, text[0, 4 if word else 3])
    assert find_word(pipe, cat(), among=[])[0] == ""
    again = find_word(pipe, cat(), among=["dog", "dog"])
    assert again[0] == word
    many = words_for(pipe, [cat()], "found", among=[f"dog{i}" for i in range(40)])["cat"]
    text, _ = pipe.encode_prompt(f"a red {many.found} cat".replace("  ", " "), "cpu", 1, False)
    assert (text[0] == many.embedding).all(-1).any()
    assert torch.equal(again[1], embedding)


def test_the_shipped_model_finds_the_colours() -> None:
    pipe = shapes.load("sd")
    (task,) = make_subject_tasks(2, 1, "tune")
    found = [find_word(pipe, subject, among=list(COLOURS))[0] for subject in task.subjects(False)]
    assert found == [colour for _, colour in task.layout.asked]


def test_a_vocabulary_too_large_wants_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.sd()
    monkeypatch.setattr("attnctrl.words.MOST_WORDS", 3)
    with pytest.raises(ac.ControlError, match=r"up to 3 are tried: give among"):
        find_word(pipe, cat())


def test_what_cannot_be_says_so() -> None:
    with pytest.raises(ac.ControlError, match="StableDiffusionXLPipeline cannot be learned"):
        learn_word(tiny.sdxl(), cat())
    with pytest.raises(ac.ControlError, match="StableDiffusionXLPipeline cannot be found"):
        find_word(tiny.sdxl(), cat())
    spaced = ac.Subject("a  cat", [picture(1)], [middle()], prompt="a cat")
    with pytest.raises(ac.ControlError, match='"a  cat" is spelled otherwise in its prompt "a cat"'):
        find_word(tiny.sd(), spaced)
    with pytest.raises(ac.ControlError, match='words are "guessed": choose one of learned, found'):
        words_for(tiny.sd(), [cat()], "guessed")
    with pytest.raises(ac.ControlError, match='use words="found"'):
        words_for(tiny.sd(), [cat()], among=["red"])
