"""PersonaHOI against its card."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.subjects.persona_hoi import low_pass, merged
from attnctrl.sites import Site
from tests import tiny
from tests.editing.material import attention, call, latents
from tests.methods import sampling
from tests.spies import assert_restored, snapshot
from tests.transformers import FAMILIES

EMBEDDING = torch.linspace(-3, 3, 16)
TWICE = [tiny.PROMPT] * 2
HEAD = ac.Region("cat", box=(0.0, 0.0, 0.5, 0.5))
EVERYWHERE = ac.Region("cat", box=(0.0, 0.0, 1.0, 1.0))
INSIDE = torch.zeros(16, 16, dtype=torch.bool)
INSIDE[:8, :8] = True


def drawn(pipe: Any, *controls: ac.Control, prompts: list[str] = TWICE, **options: Any) -> torch.Tensor:
    options.setdefault("latents", latents()[:1].repeat(len(prompts), 1, 1, 1))
    with ac.control(pipe, *controls, record=False):
        return tiny.draw(pipe, prompts, **options)


def test_the_gaussian_by_hand() -> None:
    row = torch.tensor([[0.0, 1.0, 0.0]])
    side, middle = torch.exp(torch.tensor(-0.5)), 1.0
    # At the edge the weights are those of what is there.
    edge = side / (middle + side + torch.exp(torch.tensor(-2.0)))
    expected = torch.stack([edge, middle / (middle + 2 * side), edge])[None]
    torch.testing.assert_close(low_pass(row, 1.0), expected)


@pytest.mark.parametrize("sigma", [0.01, 0.5, 2.5, 100.0])
def test_the_two_parts_make_the_whole(sigma: float) -> None:
    features = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    high = merged(features, features, everywhere, sigma)
    torch.testing.assert_close(high + merged(features, features, ~everywhere, sigma), features)
    torch.testing.assert_close(low_pass(torch.full_like(features, 3.0), sigma), torch.full_like(features, 3.0))
    if sigma == 0.01:
        torch.testing.assert_close(high, torch.zeros_like(features))  # what is coarse at this width is everything
    if sigma == 100.0:
        mean = features.mean(dim=(2, 3), keepdim=True).expand_as(features)
        torch.testing.assert_close(low_pass(features, sigma), mean, atol=0.01, rtol=0)


def test_outside_the_head_the_latents_are_the_plain_rows_which_notices_nothing() -> None:
    pipe = tiny.sd()
    before, stock = snapshot(pipe), drawn(pipe)
    found = drawn(pipe, ac.PersonaHOI([HEAD], embeddings={"cat": EMBEDDING}))
    assert torch.equal(found[0], stock[0])
    assert torch.equal(found[1][:, ~INSIDE], stock[0][:, ~INSIDE])
    assert not torch.allclose(found[1][:, INSIDE], stock[0][:, INSIDE], atol=1e-3)
    assert_restored(before, pipe)


def test_with_the_head_everywhere_and_no_skips_it_is_the_personalised_model() -> None:
    pipe = tiny.sd()
    found = drawn(pipe, ac.PersonaHOI([EVERYWHERE], embeddings={"cat": EMBEDDING}, skips=False))
    wanted = drawn(pipe, ac.DelayedSubject({"cat": EMBEDDING}, delay=0.0))
    torch.testing.assert_close(found[1], wanted[1], atol=1e-4, rtol=1e-4)


def test_the_masked_probabilities_by_definition() -> None:
    """Softmax over all tokens, then the embedding's column times the head's mask, nothing renormalised."""
    control = ac.PersonaHOI([HEAD], embeddings={"cat": EMBEDDING}, skips=False)
    made = sampling(TWICE)
    made.skips = [Site("up", "skip", "up", 0, 0)]
    state = control.begin(made)
    given = replace(call("cross"), project=lambda text: (text[:, None, :, :8] / 50, text[:, None, :, 8:] / 50))
    found = attention(control.inputs(given, state))
    assert given.project is not None
    key, value = given.project(state.text)
    probabilities = (given.query @ key.mT * given.scale).softmax(dim=-1)
    (place,) = made.find("cat")
    probabilities[:, :, [1, 2, 3], place] = 0  # of the 2 x 2 latents the head has the first
    torch.testing.assert_close(found[1], (probabilities @ value)[1])
    torch.testing.assert_close(found[0], attention(given)[0])
    free = replace(given, branch="uncond")
    assert control.inputs(free, state) is free


def test_several_heads_and_rows_without_one() -> None:
    pipe = tiny.sd()
    heads = [[], [HEAD, ac.Region("dog", box=(0.5, 0.5, 1.0, 1.0))], []]
    both = ac.PersonaHOI(heads, embeddings={"cat": EMBEDDING, "dog": -EMBEDDING})
    stock = drawn(pipe, prompts=[tiny.PROMPT] * 3)
    found = drawn(pipe, both, prompts=[tiny.PROMPT] * 3)
    torch.testing.assert_close(found[2], stock[2], atol=1e-5, rtol=1e-5)
    assert torch.equal(found[0], stock[0])
    other = INSIDE.flip(0, 1)
    assert torch.equal(found[1][:, ~(INSIDE | other)], stock[0][:, ~(INSIDE | other)])
    assert not torch.allclose(found[1][:, other], stock[0][:, other], atol=1e-3)


def test_asked_for_nothing_it_is_the_stock_run_and_it_composes() -> None:
    pipe = tiny.sd()
    stock = drawn(pipe)
    for control in (ac.PersonaHOI([HEAD]), ac.PersonaHOI((), embeddings={"cat": EMBEDDING})):
        assert control.idle
        assert torch.equal(drawn(pipe, control), stock)
    beside = ac.RegionMask([ac.Region("dog", box=(0.5, 0.0, 1.0, 1.0))])
    found = drawn(pipe, beside, ac.PersonaHOI([HEAD], embeddings={"cat": EMBEDDING}))
    assert torch.equal(found[1][:, ~INSIDE], found[0][:, ~INSIDE])
    assert not torch.allclose(found[0], stock[0], atol=1e-4)


def test_bad_input_is_a_sentence() -> None:
    for embeddings, prompts, sentence in (
        ({"cat": EMBEDDING}, [tiny.PROMPT], r"prompt=\[prompt, prompt\]"),
        ({"dog": EMBEDDING}, TWICE, 'has a head of "cat" and no embedding'),
        ({"cat": EMBEDDING[:3]}, TWICE, "PersonaHOI has an embedding of shape"),
        ({"cat": EMBEDDING}, [tiny.PROMPT, "a dog"], '"cat" is not in the'),
    ):
        with pytest.raises(ac.ControlError, match=sentence):
            drawn(tiny.sd(), ac.PersonaHOI([HEAD], embeddings=embeddings), prompts=prompts)
    entry = FAMILIES["pixart"]
    pipe = entry.make()
    with (
        pytest.raises(ac.ControlError, match="this model has none"),
        ac.control(pipe, ac.PersonaHOI([HEAD], embeddings={"cat": EMBEDDING}), record=False),
    ):
        pipe(TWICE, num_inference_steps=2, height=entry.size[0], width=entry.size[1], **entry.free, **entry.more)
