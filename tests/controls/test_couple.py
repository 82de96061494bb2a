"""RegionPrompts in one joint sequence: attention couple as several softmaxes, each by token groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.control import Window
from attnctrl.controls.layout.couple import rounds
from attnctrl.processors.attend import attend
from attnctrl.processors.work import Branch, Work
from attnctrl.report import Report
from attnctrl.sampling import Active, Sampling
from attnctrl.sites import Call, Site, TokenLayout
from attnctrl.text import Text
from tests.controls.test_joint import MODELS, outputs, pipeline, stock_outputs
from tests.methods import sampling, step
from tests.parts import Tiny
from tests.probes import REGIONS
from tests.transformers import draw

SITE = Site("block.attn", "joint", "", 0)
PROMPT, BLOCK, LATENTS = 7, 24, 4
"""Tokens of the prompt, of each region's text, and of the latents, 2 x 2, which stand behind them."""


def given(filled: int = BLOCK) -> Sampling:
    """A sampling with joint attention; the texts of the regions are `filled` tokens long and filled up with zeros."""
    base = replace(sampling("a cat and a dog"), sites=[SITE], text_tokens=PROMPT, appended={"cond": 8, "uncond": 8})

    def encode(texts: list[str]) -> Text:
        states = base.encode(texts).positive + 1
        states[1:, filled:] = 0  # all but the first
        return Text(states)

    return replace(base, encode=encode)


def attention(control: ac.RegionPrompts, where: Sampling, branch: str = "cond", at: int = 0) -> Any:
    """What a layer of random tokens gives, and the query, key and value that it is computed from."""
    text = control.context(Text(torch.zeros(1, PROMPT, 16)), where).positive.shape[1]
    layout = TokenLayout(slice(text, text + LATENTS), slice(0, text), (1, 2, 2))
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, text + LATENTS, 8) for _ in range(3))
    call = Call(SITE, step(at), branch, query, key, value, 8**-0.5, layout, layout)
    active = Active(0, control, control.begin(where), frozenset(control.points()))
    work = Work(step(at), (1, 2, 2), text, (Branch(branch, slice(0, 1)),), {branch: (active,)}, Report())
    return attend(call, work), call


def softmax(call: Call, queries: list[int], keys: list[int]) -> torch.Tensor:
    scores = call.query[:, :, queries] @ call.key[:, :, keys].transpose(-1, -2) * call.scale
    return scores.softmax(dim=-1) @ call.value[:, :, keys]


PROMPT_TOKENS = list(range(PROMPT))
FIRST, SECOND = (list(range(PROMPT + r * BLOCK, PROMPT + (r + 1) * BLOCK)) for r in range(2))
AT = PROMPT + 2 * BLOCK
ALL_LATENTS = list(range(AT, AT + LATENTS))


@pytest.mark.parametrize("second", [(0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)], ids=["apart", "overlapping"])
def test_the_sum_of_softmaxes(second: tuple[float, float, float, float]) -> None:
    """The definition, written out: what every token gets, with regions apart (one round) and overlapping (two)."""
    regions = (ac.Region("zebra", box=(0, 0, 0.5, 1)), ac.Region("lion", box=second, weight=3.0))
    control = ac.RegionPrompts(regions, base_ratio=0.2)
    result, call = attention(control, given())
    left, right = [AT, AT + 2], [AT + 1, AT + 3]
    shared = second[0] == 0
    shares = {1: (0.2, 0.6) if shared else (0.8, 0.0), 2: (0.0, 0.8)}
    for side, (of_first, of_second) in ((left, shares[1]), (right, shares[2])):
        expected = 0.2 * softmax(call, side, PROMPT_TOKENS + ALL_LATENTS)
        expected = expected + of_first * softmax(call, side, FIRST + ALL_LATENTS)
        expected = expected + of_second * softmax(call, side, SECOND + ALL_LATENTS)
        torch.testing.assert_close(result[:, :, side], expected)
    stock = softmax(call, PROMPT_TOKENS, PROMPT_TOKENS + ALL_LATENTS)
    torch.testing.assert_close(result[:, :, PROMPT_TOKENS], stock)
    torch.testing.assert_close(result[:, :, FIRST], softmax(call, FIRST, FIRST + left))
    inside = left + right if shared else right
    torch.testing.assert_close(result[:, :, SECOND], softmax(call, SECOND, SECOND + sorted(inside)))


def test_softened_borders_share_as_with_text_keys() -> None:
    """Feathering over the whole picture: every latent has both regions, by the shares of `couple_weights`."""
    control = ac.RegionPrompts(REGIONS, base_ratio=0.0, feather=0.5)
    result, call = attention(control, given())
    regions, base = control.begin(given()).shares[1, 2, 2]
    assert (regions > 0).all()
    expected = sum(
        share[0, :, None] * softmax(call, ALL_LATENTS, text + ALL_LATENTS)
        for share, text in ((regions[:, 0], FIRST), (regions[:, 1], SECOND), (base, PROMPT_TOKENS))
    )
    torch.testing.assert_close(result[:, :, ALL_LATENTS], expected)


def test_what_fills_up_a_text_is_not_seen() -> None:
    result, call = attention(ac.RegionPrompts(REGIONS, base_ratio=0.0), given(filled=3))
    left, right = [AT, AT + 2], [AT + 1, AT + 3]
    torch.testing.assert_close(result[:, :, left], softmax(call, left, FIRST + ALL_LATENTS))
    torch.testing.assert_close(result[:, :, right], softmax(call, right, SECOND[:3] + ALL_LATENTS))


@pytest.mark.parametrize(("branch", "at"), [("cond", 40), ("uncond", 0), ("skip", 0)])
def test_out_of_sight_the_prompt_and_the_latents_are_stock(branch: str, at: int) -> None:
    """Beyond the window, which ends at 0.3, and in other guidance branches."""
    control = ac.RegionPrompts(REGIONS)
    assert control.acts(step(at), branch, control.begin(given()))
    result, call = attention(control, given(), branch, at)
    stock = PROMPT_TOKENS + ALL_LATENTS
    torch.testing.assert_close(result[:, :, stock], softmax(call, stock, stock))


def test_a_negative_prompt_of_its_own_is_left_alone() -> None:
    control = ac.RegionPrompts(REGIONS)
    assert not control.acts(step(0), "uncond", control.begin(replace(given(), appended={"cond": 8})))


def test_words_of_the_regions_are_confined_in_the_prompt() -> None:
    """The cat of the prompt (token 2) is hidden from the right half, which no region covers; with confine off, not."""
    cat = (ac.Region("cat", box=(0, 0, 0.5, 1)),)
    at = AT - BLOCK
    right, latents = [at + 1, at + 3], list(range(at, at + LATENTS))
    for confine, keys in ((True, [i for i in PROMPT_TOKENS if i != 2]), (False, PROMPT_TOKENS)):
        result, call = attention(ac.RegionPrompts(cat, confine=confine), given())
        torch.testing.assert_close(result[:, :, right], softmax(call, right, keys + latents))
        every = PROMPT_TOKENS + latents
        torch.testing.assert_close(result[:, :, PROMPT_TOKENS], softmax(call, PROMPT_TOKENS, every))


def test_regions_that_do_not_overlap_share_a_round() -> None:
    touched = torch.tensor([[[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]]).bool()
    assert rounds(touched) == [[0, 2, 3], [1]]
    assert rounds(touched | torch.tensor([[[True], [False], [False], [True]]])) == [[0], [1], [2], [3]]


def test_the_unconditional_prediction_is_not_for_regions() -> None:
    with pytest.raises(ac.ControlError, match=r'not beside its negative prompt: use branches=\("cond",\)'):
        ac.RegionPrompts(REGIONS, branches=("cond", "uncond")).begin(given())


@pytest.mark.parametrize("model", ["flux", "sd3"])
def test_one_region_over_all_with_the_prompt_itself_is_stock(model: str) -> None:
    """Not on QwenImage and CogVideoX, where text has positions, or an encoding that depends on its length."""
    family: Tiny = MODELS[model]
    pipe = pipeline(model)
    expected = draw(pipe, family)
    same = ac.Region("a cat and a dog", box=(0, 0, 1, 1))
    with ac.control(pipe, ac.RegionPrompts((same,), window=Window(0.0, 1.0))):
        torch.testing.assert_close(draw(pipe, family), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_before_its_window_nothing_changes(model: str) -> None:
    late = ac.RegionPrompts(REGIONS, window=Window(0.5, 1.0))
    expected = stock_outputs(model, "cond", steps=2)
    first = len(expected) // 2
    for mine, stock in zip(outputs(model, "cond", late, steps=2)[:first], expected[:first], strict=True):
        torch.testing.assert_close(mine, stock, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["flux", "sd3"])
def test_every_picture_of_a_batch_has_its_own_regions(model: str) -> None:
    """Two prompts with other regions and other numbers of them: each row is the picture that it is alone."""
    family, pipe = MODELS[model], pipeline(model)
    prompts, regions = ["a cat and a dog", "the red bird"], (REGIONS, (ac.Region("the bird", box=(0, 0, 1, 0.5)),))

    def pictures(prompt: list[str], about: tuple) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(7) for _ in prompt]
        more = {"negative_prompt": ["a bird"] * len(prompt)} if model == "flux" else {}
        with ac.control(pipe, ac.RegionPrompts(about, window=Window(0.0, 1.0))):
            return draw(pipe, family, prompt, steps=2, generator=generators, **more)

    together = pictures(prompts, regions)
    for row, prompt, about in zip(together, prompts, regions, strict=True):
        torch.testing.assert_close(row, pictures([prompt], (about,))[0], atol=1e-4, rtol=1e-4)
