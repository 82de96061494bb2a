"""Every transformer family: idle it is the stock pipeline, and our layers compute what the stock ones do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.sites import Call
from tests.parts import Tiny
from tests.probes import Inputs, Mask, Output
from tests.spies import Stop, assert_restored, snapshot
from tests.transformers import FAMILIES, draw
from tests.videos import VIDEOS

ALL = ac.Where(kinds=("self", "cross", "joint"))
EVERY = {**FAMILIES, **VIDEOS}
every_family = pytest.mark.parametrize("family", EVERY.values(), ids=EVERY)


def denoisers(pipe: Any) -> list[Any]:
    found = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    return [denoiser for denoiser in found if denoiser is not None]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@every_family
@pytest.mark.parametrize("free", [False, True])
def test_without_controls_the_picture_is_the_stock_one(family: Tiny, free: bool) -> None:
    pipe = family.make()
    expected = draw(pipe, family, free=free)
    with ac.control(pipe), ac.control(pipe):
        assert torch.equal(draw(pipe, family, free=free), expected)
    assert torch.equal(draw(pipe, family, free=free), expected)


def negatives(family: Tiny, prompts: int) -> dict[str, list[str]]:
    """The family's negative prompt for each of several prompts."""
    negative = family.guided.get("negative_prompt")
    return {} if negative is None else {"negative_prompt": [negative] * prompts}


def stop(call: Call) -> Call:
    """Break off in the second step."""
    if call.step.index == 1:
        raise Stop
    return call


@every_family
def test_every_processor_comes_back(family: Tiny) -> None:
    pipe = family.make()
    before = snapshot(pipe)
    with pytest.raises(Stop), ac.control(pipe, Inputs(edit=stop, where=ALL)):
        draw(pipe, family)
    assert_restored(before, pipe)


@every_family
@pytest.mark.parametrize("free", [False, True])
def test_our_layers_compute_what_the_stock_ones_do(family: Tiny, free: bool) -> None:
    """A control that changes nothing sends every layer of both branches through our own code."""
    pipe, seen = family.make(), set()
    expected = draw(pipe, family, free=free)
    both = {"where": ALL, "branches": ("cond", "uncond")}
    controls = (
        Inputs(edit=lambda call: (seen.add((call.site.name, call.branch)), call)[1], **both),
        Output(edit=lambda output: output, **both),
    )
    with ac.control(pipe, *controls):
        close(draw(pipe, family, free=free), expected)
    assert len(seen) == family.sites * (1 if free or family.unguided else 2)


@every_family
def test_the_layout_of_every_call(family: Tiny) -> None:
    """Text and latents share out the tokens, and the grid is that of the picture."""
    pipe, calls = family.make(), []
    with ac.control(pipe, Inputs(edit=lambda call: (calls.append(call), call)[1], where=ALL)):
        draw(pipe, family, steps=2)
    calls = [call for call in calls if call.step.index == 0]
    assert len(calls) * family.experts == family.sites
    frames, height, width = family.grid
    for call in calls:
        assert call.branch == "cond"
        assert call.queries.grid == family.grid
        assert call.queries.latent.stop - call.queries.latent.start == frames * height * width
        if call.site.kind == "joint":
            assert call.queries is call.keys
            first, second = sorted((s.start, s.stop) for s in (call.queries.text, call.queries.latent))
            assert first[0] == 0
            assert first[1] <= second[0]  # Z-Image pads the latents
            assert second[1] <= call.query.shape[2]


@every_family
def test_batches_and_several_pictures_per_prompt(family: Tiny) -> None:
    """Each picture of a controlled batch is what it is alone."""
    pipe = family.make()
    prompts = ["a cat and a dog", "a dog and a bird"]
    control = Output(edit=lambda output: output * 1.1, where=ALL)
    with ac.control(pipe, control):
        generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
        more = negatives(family, 2)
        # A copy: Z-Image writes into the list that it is given.
        both = draw(pipe, family, list(prompts), generator=generators, **more, **family.of_two)
        for row, prompt in enumerate(prompts):
            alone = draw(pipe, family, prompt, generator=torch.Generator().manual_seed(row + 1))
            close(both[row : row + 1], alone)


@every_family
def test_phrases_are_found_where_they_stand(family: Tiny) -> None:
    """The position of a word among the text tokens of a call is the one at which its embedding stands."""
    pipe, calls = family.make(), []
    with ac.control(pipe, Mask(make=lambda call: calls.append(call), where=ALL)) as run:
        draw(pipe, family, steps=2)
    text = next(c.keys.text for c in calls if c.site.kind != "self")
    for position in run.sampling.find("dog"):
        assert position < text.stop - text.start
        assert any(
            "dog" in t.tokens[position - t.offset]
            for t in run.sampling.tokens[0]
            if 0 <= position - t.offset < len(t.tokens)
        )
    with pytest.raises(ac.ControlError, match='"bird" is not in the prompt'):
        run.sampling.find("bird")


@every_family
def test_the_users_attention_backend_stays(family: Tiny) -> None:
    """Chosen inside a control block, it reaches the stock processors, which still run wherever nothing acts."""
    pipe = family.make()
    stock = [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")]
    choosing = [processor for processor in stock if hasattr(processor, "_attention_backend")]
    try:
        with ac.control(pipe):
            pipe.transformer.set_attention_backend("_native_math")
            draw(pipe, family)
        assert all(processor._attention_backend == "_native_math" for processor in choosing)
    finally:
        pipe.transformer.set_attention_backend("native")


@every_family
def test_the_models_own_mask_is_kept(family: Tiny) -> None:
    """Text of padding alone is invisible wherever the stock model hides it."""
    pipe, masks = family.make(), []
    both = {"where": ALL, "branches": ("cond", "uncond")}
    with ac.control(pipe, Inputs(edit=lambda call: (masks.append(call.mask), call)[1], **both)):
        draw(pipe, family, ["a cat", "a dog and a red bird and the cat"], **negatives(family, 2), **family.of_two)
    assert any(mask is not None for mask in masks) == family.masks
    for mask in masks:
        assert mask is None or mask.shape[0] in (1, 2)
