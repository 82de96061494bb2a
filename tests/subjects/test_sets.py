"""StoryDiffusion and ConsiStory: pictures of a set that see each other, and references."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.subjects.rows import looks_of_all, random_part
from tests import tiny
from tests.methods import sampling
from tests.subjects.material import PROMPT, call, draw, latents, two
from tests.subjects.test_references import attended

SET = ("a cat and a dog", "a red cat", "a cat and a bird")
ALWAYS: dict[str, Any] = {"keep": 1.0, "early": 1.0, "late": 1.0, "window": ac.Window()}


def story(**params: Any) -> ac.Control:
    return ac.ConsistentSelfAttention(**{**ALWAYS, **params})


def consi(**params: Any) -> ac.Control:
    return ac.SharedAttention(phrases=["cat"], **{"window": ac.Window(), **params})


def test_everybody_looks_at_the_others() -> None:
    looks = looks_of_all([(0, torch.arange(4), 1.0), (3, torch.arange(2), 2.0)], slice(0, 2), call(4))
    assert [look.who[:, 0].tolist() for look in looks] == [[False, True], [True, True]]


def test_a_draw_can_be_repeated() -> None:
    tokens = torch.arange(1000)
    one, same, other = (random_part(tokens, 0.5, draw) for draw in ((0, 1), (0, 1), (0, 2)))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert 400 < len(one) < 600
    assert random_part(tokens, 1.0, (0,)) is tokens


def test_all_of_it_is_concatenation() -> None:
    given = call(3)
    control = story(anchors=3)
    made = attended(control.inputs(given, control.begin(sampling(list(SET)))))
    key, value = (t.transpose(0, 1).flatten(1, 2) for t in (given.key, given.value))
    wanted = (given.query @ key.mT * given.scale).softmax(dim=-1) @ value
    torch.testing.assert_close(made, wanted)


def test_anchors_do_not_see_the_others() -> None:
    pipe = tiny.sd()
    start = latents(3)
    three = draw(pipe, (), story(anchors=2), prompts=SET, latents=start)
    pair = draw(pipe, (), story(anchors=2), prompts=SET[:2], latents=start[:2])
    torch.testing.assert_close(three[:2], pair, atol=1e-4, rtol=1e-4)
    stock = draw(pipe, (), prompts=SET, latents=start)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(three, stock, strict=True))


def test_a_coin_decides_which_layers_take_part() -> None:
    control = story(early=0.5, anchors=3)
    state = control.begin(sampling(list(SET)))
    took_part = [bool(control.inputs(call(3, at=at), state).streams) for at in range(20)]
    assert 2 < sum(took_part) < 18
    assert took_part == [bool(control.inputs(call(3, at=at), state).streams) for at in range(20)]


def test_only_the_subject_is_shared() -> None:
    control = consi(keep=1.0, where=ac.Where(kinds=("self",)))
    state = control.begin(sampling(list(SET)))
    assert control.inputs(call(3), state).streams == ()  # in the first step nothing is known
    made = call(3, "cross")
    key = torch.zeros_like(made.key)
    for picture, words in enumerate(state.owners.words[:, 0]):
        key[picture, :, words] = 50.0
    query = torch.ones_like(made.query) * torch.tensor([1.0, -1.0, -1.0, -1.0])[None, None, :, None]
    control.inputs(made.change(key=key, query=query), state)
    streams = control.inputs(call(3, at=1), state).streams
    assert [s.key.shape[2] for s in streams] == [1, 1]  # two anchors, of each the one latent that is the cat's
    assert [bool(torch.isinf(s.offset[i]).all()) for i, s in enumerate(streams)] == [True, True]  # type: ignore[index]


@pytest.mark.parametrize("make", [story, consi])
def test_references_serve_the_pictures(make: Any) -> None:
    pipe, subjects = tiny.sd(), two(placed=False)
    control = make(subjects=subjects, anchors=0)
    stock, drawn = draw(pipe, subjects), draw(pipe, subjects, control)
    torch.testing.assert_close(drawn[1:], stock[1:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(drawn[0], stock[0], atol=1e-3)


@pytest.mark.parametrize("make", [story, consi])
def test_asked_for_nothing_they_are_the_stock_run(make: Any) -> None:
    pipe = tiny.sd()
    stock = draw(pipe, (), prompts=SET)
    for control in (make(keep=0.0), make(anchors=0), make(subjects=two(strength=0.0), anchors=0)):
        assert control.idle
        assert torch.equal(draw(pipe, (), control, prompts=SET), stock)


def test_shared_attention_acts_on_a_set() -> None:
    pipe = tiny.sd()
    stock, drawn = draw(pipe, (), prompts=SET), draw(pipe, (), consi(), prompts=SET)
    assert torch.isfinite(drawn).all()
    assert not torch.allclose(drawn, stock, atol=1e-4)
    with pytest.raises(ac.ControlError, match='"dog" is not in the prompt'):
        draw(pipe, (), ac.SharedAttention(phrases=["dog"]), prompts=SET)
    with pytest.raises(ac.ControlError, match="one list of phrases"):
        draw(pipe, (), ac.SharedAttention(phrases="cat"), prompts=SET)
    assert SET[0] == PROMPT
