"""Controls for subjects on the trained transformers: what is absent leaves no trace, nor does another's picture.

The last layer of the last step is the place to look: what a control did there no later layer can spread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
from attnctrl.sites import Call

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
SOFT: Any = pytest.param(lambda s: ac.TimeAwareReference(s, from_layer=0.9, window=LAST), id="time-aware-reference")
"""Here all latents see every reference, more or less."""


@dataclass(frozen=True)
class Shake(ac.Control):
    """Other keys and values for some tokens of a row, before what follows it looks at them."""

    branches: tuple[str, ...] = field(default=("cond", "uncond"), kw_only=True)
    row: int = 0
    part: Callable[[Call], Any] = lambda call: call.keys.latent

    def inputs(self, call: Call, state: Any) -> Call:
        key, value = call.key.clone(), call.value.clone()
        key[self.row, :, self.part(call)] += 1.0
        value[self.row, :, self.part(call)] -= 2.0
        return call.change(key=key, value=value)


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


def pictures(texts: list[str], *controls: ac.Control) -> torch.Tensor:
    """The latents of a picture for each text, (texts, 8, 8, channels), after two steps."""
    seeds = [torch.Generator().manual_seed(i) for i in range(len(texts))]
    with ac.control(dit(), *controls, record=False):
        made = dit()(texts, generator=seeds, num_inference_steps=2, max_sequence_length=32, output_type="latent")
    return made.images.unflatten(1, (8, 8))


def drawn(subjects: tuple[ac.Subject, ...], *controls: ac.Control) -> torch.Tensor:
    """The first picture's latents, (8, 8, channels), with its references in further rows."""
    return pictures([PROMPT, *reference_prompts(subjects)], ac.DrawReferences(subjects), *controls)[0]


@pytest.mark.parametrize("make", HARD)
def test_another_subjects_picture_does_not_reach_a_region(make: Make) -> None:
    first, second = (drawn(given, make(given)) for given in (pair("blue"), pair("yellow")))
    torch.testing.assert_close(first[:, :4], second[:, :4], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first[:, 4:], second[:, 4:], atol=1e-3)


@pytest.mark.parametrize("make", [*HARD, SOFT])
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


def drawn_clips(prompt: list[str], *controls: ac.Control) -> torch.Tensor:
    """The latents of a clip for each prompt, (prompts, channels, 9, 16, 16), after two steps."""
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompt))]
    with ac.control(clips(), *controls, record=False):
        given = {"num_inference_steps": 2, "guidance_scale": 1.0, **shapes.VIDEO_CALL}
        return clips()(prompt, generator=seeds, output_type="latent", **given).frames


def clip(prompt: list[str], *controls: ac.Control) -> torch.Tensor:
    return drawn_clips(prompt, *controls)[0]


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


def test_objects_of_a_clip_do_not_see_each_other() -> None:
    layers = len(clips().transformer.blocks)
    where = ac.Where(kinds=("self",), skip=layers - 1)
    regions = (ac.Region("circle", box=LEFT), ac.Region("square", box=RIGHT))
    masks = ac.ObjectMasks(regions, where=where, window=LAST, cross_weight=0.0, self_weight=1.0)
    columns = torch.arange(8).repeat(9 * 8)
    shake = Shake(part=lambda call: columns >= 4, where=where, window=LAST)
    stock, shaken = clip([PROMPT], masks), clip([PROMPT], shake, masks)
    torch.testing.assert_close(shaken[..., :8], stock[..., :8], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(shaken[..., 8:], stock[..., 8:], atol=1e-3)


@pytest.mark.parametrize("family", ["dit", "video"])
def test_a_reference_in_context(family: str) -> None:
    """Its latents are seen, not its text; it sees nobody; and without one nothing changes."""
    texts = [PROMPT, "a red circle moving left on a white background"]
    if family == "dit":
        layers = len(dit().transformer.transformer_blocks) + len(dit().transformer.single_transformer_blocks)
    else:
        layers = len(clips().transformer.blocks)
    where = ac.Where(kinds=("self", "joint"), skip=layers - 1)

    def both(*controls: ac.Control) -> torch.Tensor:
        return (pictures if family == "dit" else drawn_clips)(texts, *controls)

    def shaken(row: int, part: Callable[[Call], Any]) -> torch.Tensor:
        return both(Shake(row=row, part=part, where=where, window=LAST), control)

    control = ac.InContextMask(references=1, where=where, window=LAST)
    stock, seen = both(), both(control)
    assert torch.equal(both(ac.InContextMask(references=0)), stock)
    torch.testing.assert_close(seen[1], stock[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(seen[0], stock[0], atol=1e-4)
    torch.testing.assert_close(shaken(0, lambda call: call.keys.latent)[1], seen[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(shaken(1, lambda call: call.keys.latent)[0], seen[0], atol=1e-3)
    if family == "dit":
        of_text = shaken(1, lambda call: call.keys.text)
        torch.testing.assert_close(of_text[0], seen[0], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(of_text[1], seen[1], atol=1e-3)
