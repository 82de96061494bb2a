"""MagicFace against its card."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.subjects.rows import PLACINGS
from tests import tiny
from tests.joint_models import on_joint_models
from tests.methods import sampling
from tests.parts import Tiny
from tests.subjects.material import PROMPT, call, draw, two
from tests.subjects.test_references import attended
from tests.transformers import draw as draw_joint


def magic(subjects: tuple[ac.Subject, ...], **params: object) -> ac.Control:
    return ac.MagicFace(subjects, from_layer=0.0, **params)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", PLACINGS)
def test_another_subjects_pixels_do_not_reach_a_region(how: str) -> None:
    control = magic(two(), placing=how)
    state = control.begin(sampling([PROMPT, "cat", "dog"]))
    given = call()
    key, value = given.key.clone(), given.value.clone()
    key[2], value[2] = 7.0, -3.0
    first, second = (attended(control.inputs(one, state)) for one in (given, given.change(key=key, value=value)))
    # Latents 0 and 2 are the cat's, 1 and 3 the dog's.
    assert torch.equal(first[0, :, [0, 2]], second[0, :, [0, 2]])
    assert not torch.allclose(first[0, :, [1, 3]], second[0, :, [1, 3]])
    assert torch.equal(first[1], second[1])


def test_at_first_everybody_looks_at_subjects_without_a_region() -> None:
    control = magic(two(placed=False))
    state = control.begin(sampling([PROMPT, "cat", "dog"]))
    early, late = control.inputs(call(at=0), state), control.inputs(call(at=20), state)
    assert len(early.streams) == 2
    assert all(torch.isfinite(s.offset).all() for s in early.streams)  # type: ignore[arg-type]
    assert late.streams == ()  # nothing was read that says whose the latents are


def test_a_bias_of_minus_infinity_nearly_is_the_stock_run() -> None:
    pipe, subjects = tiny.sd(), two()
    keep = ac.DrawReferences(subjects)
    stock = draw(pipe, subjects, keep)
    torch.testing.assert_close(draw(pipe, subjects, keep, magic(subjects, bias=-20.0)), stock, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(draw(pipe, subjects, keep, magic(subjects))[0], stock[0], atol=1e-3)


@pytest.mark.parametrize("how", PLACINGS)
@pytest.mark.parametrize("placed", [True, False])
def test_references_stay_and_pictures_change(how: str, placed: bool) -> None:
    pipe, subjects = tiny.sd(), two(placed=placed)
    stock, drawn = draw(pipe, subjects), draw(pipe, subjects, magic(subjects, placing=how))
    torch.testing.assert_close(drawn[1:], stock[1:], atol=1e-4, rtol=1e-4)
    assert torch.isfinite(drawn).all()
    assert not torch.allclose(drawn[0], stock[0], atol=1e-3)


def test_an_absent_subject_is_the_stock_run() -> None:
    pipe, nobody = tiny.sd(), two(strength=0.0)
    stock = draw(pipe, nobody)
    assert torch.equal(draw(pipe, nobody, magic(nobody)), stock)
    assert torch.equal(draw(pipe, two(), ac.MagicFace(two(), from_layer=1.0)), stock)
    mixed = (two()[0], nobody[1])
    other = (two()[0], two(strength=0.0, second=9)[1])
    assert torch.equal(draw(pipe, mixed, magic(mixed)), draw(pipe, other, magic(other)))


def test_exchanged_regions_exchange_the_subjects() -> None:
    control, (cat, dog) = magic(two()), two()
    swapped = (ac.Subject("cat", cat.image, cat.mask, dog.region), ac.Subject("dog", dog.image, dog.mask, cat.region))
    other = magic(swapped)
    rows = sampling([PROMPT, "cat", "dog"])
    one, two_ = (attended(c.inputs(call(), c.begin(rows))) for c in (control, other))
    assert not torch.allclose(one[0], two_[0])


def test_it_composes_with_a_layout_method() -> None:
    pipe, subjects = tiny.sd(), two()
    regions = [[s.placed for s in subjects], [], []]
    alone = draw(pipe, subjects, magic(subjects))
    both = draw(pipe, subjects, ac.RegionPrompts(regions), magic(subjects))  # type: ignore[arg-type]
    assert torch.isfinite(both).all()
    assert not torch.allclose(both[0], alone[0], atol=1e-4)


@on_joint_models
def test_joint_attention(family: Tiny) -> None:
    pipe, subjects = family.make(), two()
    texts = [PROMPT, "cat", "dog"]

    def drawn(*controls: ac.Control) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(i) for i in range(3)]
        with ac.control(pipe, *controls, record=False):
            return draw_joint(pipe, family, texts, generator=seeds)

    stock, changed = drawn(), drawn(magic(subjects))
    torch.testing.assert_close(changed[1:], stock[1:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(changed[0], stock[0], atol=1e-4)
    with pytest.raises(ac.ControlError, match="reads in cross-attention alone"):
        drawn(magic(two(placed=False)))
