"""Controls for subjects on the trained transformers: what is absent leaves no trace, nor does another's picture.

The last layer of the last step is the place to look: what a control did there no later layer can spread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import attnctrl as ac
from attnctrl import shapes
from attnctrl.controls.subjects.rows import reference_prompts
from attnctrl.shapes.render import render, thing_mask
from attnctrl.shapes.world import Scene, Thing

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
PROMPT = "a circle and a square on a white background"
LAST = ac.Window(0.5, 1.0)
Make = Callable[[tuple[ac.Subject, ...]], ac.Control]
HARD: list[Any] = [
    pytest.param(lambda s: ac.MagicFace(s, from_layer=0.9, window=LAST), id="magic-face"),
    pytest.param(lambda s: ac.MaskedReference(s, outside=0.0, from_layer=0.9, window=LAST), id="masked-reference"),
    pytest.param(lambda s: ac.MaskedAdaIN(s, window=LAST), id="masked-adain"),
]
"""The methods in which a latent gets its own subject's reference alone."""


def subject(shape: str, colour: str, region: Any, strength: float = 1.0) -> ac.Subject:
    thing = Thing(shape, colour, 0.5, 0.5, 0.2)
    pixels = render([Scene((thing,), "gray")])[0].permute(1, 2, 0).numpy()
    picture = Image.fromarray((255 * pixels).round().astype(np.uint8))
    return ac.Subject(shape, picture, thing_mask(thing) > 0.5, region, strength)


def pair(second: str = "blue", strengths: tuple[float, float] = (1.0, 1.0)) -> tuple[ac.Subject, ac.Subject]:
    """A red circle on the left and a square of the colour `second` on the right."""
    return subject("circle", "red", LEFT, strengths[0]), subject("square", second, RIGHT, strengths[1])


@cache
def dit() -> Any:
    pipe = shapes.load("dit")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(subjects: tuple[ac.Subject, ...], *controls: ac.Control) -> torch.Tensor:
    """The first picture's latents, (8, 8, channels), after two steps, with its references in further rows."""
    texts = [PROMPT, *reference_prompts(subjects)]
    seeds = [torch.Generator().manual_seed(i) for i in range(len(texts))]
    with ac.control(dit(), ac.DrawReferences(subjects), *controls, record=False):
        made = dit()(texts, generator=seeds, num_inference_steps=2, max_sequence_length=32, output_type="latent")
    return made.images[0].unflatten(0, (8, 8))


@pytest.mark.parametrize("make", HARD)
def test_another_subjects_picture_does_not_reach_a_region(make: Make) -> None:
    first, second = (drawn(given, make(given)) for given in (pair("blue"), pair("yellow")))
    torch.testing.assert_close(first[:, :4], second[:, :4], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first[:, 4:], second[:, 4:], atol=1e-3)


@pytest.mark.parametrize("make", HARD)
def test_an_absent_subject_leaves_no_trace(make: Make) -> None:
    nobody = pair(strengths=(0.0, 0.0))
    assert torch.equal(drawn(nobody, make(nobody)), drawn(nobody))
    absent = [pair(colour, strengths=(1.0, 0.0)) for colour in ("blue", "yellow")]
    first, second = (drawn(given, make(given)) for given in absent)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first[:, :4], drawn(absent[0])[:, :4], atol=1e-3)


def test_exchanged_regions_exchange_the_subjects() -> None:
    there = pair()
    back = (subject("circle", "red", RIGHT), subject("square", "blue", LEFT))
    stock, one, other = drawn(there), *(drawn(given, ac.MaskedAdaIN(given)) for given in (there, back))

    def moved(made: torch.Tensor, half: slice) -> torch.Tensor:
        return (made - stock)[:, half].mean(dim=(0, 1))

    left, right = slice(0, 4), slice(4, 8)
    # Wherever it stands, the circle moves the latents its way, not the square's.
    circle, square = moved(one, left), moved(one, right)
    assert (moved(other, right) - circle).norm() < (moved(other, right) - square).norm()
    assert (moved(other, left) - square).norm() < (moved(other, left) - circle).norm()


@cache
def clips() -> Any:
    pipe = shapes.load("video")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip(prompt: Any, *controls: ac.Control) -> torch.Tensor:
    """The latents of the first clip, (channels, 9, 16, 16), after two steps."""
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompt))]
    with ac.control(clips(), *controls, record=False):
        given = {"num_inference_steps": 2, "guidance_scale": 1.0, **shapes.VIDEO_CALL}
        return clips()(prompt, generator=seeds, output_type="latent", **given).frames[0]


def test_another_objects_prompt_does_not_reach_a_track() -> None:
    layers = len(clips().transformer.blocks)

    def with_square(prompt: str) -> torch.Tensor:
        regions = (ac.Region("circle", box=LEFT), ac.Region("square", box=RIGHT, prompt=prompt))
        where = ac.Where(kinds=("cross",), skip=layers - 1)
        return clip([PROMPT], ac.ObjectMasks(regions, where=where, window=LAST, cross_weight=1.0, self_weight=0.0))

    first, second = with_square("a blue square"), with_square("a yellow square")
    torch.testing.assert_close(first[..., :8], second[..., :8], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first[..., 8:], second[..., 8:], atol=1e-4)
    assert torch.equal(clip([PROMPT], ac.ObjectMasks((), window=LAST)), clip([PROMPT]))


def test_a_reference_clip_is_seen_and_without_one_nothing_changes() -> None:
    layers = len(clips().transformer.blocks)
    where = ac.Where(kinds=("self",), skip=layers - 1)
    texts = [PROMPT, "a red circle moving left on a white background"]
    stock, changed = clip(texts), clip(texts, ac.InContextMask(references=1, where=where, window=LAST))
    assert not torch.allclose(stock, changed, atol=1e-4)
    assert torch.equal(clip(texts, ac.InContextMask(references=0)), stock)
