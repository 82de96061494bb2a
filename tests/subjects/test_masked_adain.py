"""Masked AdaIN of latents: the formula by hand, and a subject's latents in a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.subjects.masked_adain import MaskedAdaIN, adain
from attnctrl.controls.subjects.rows import References
from tests import tiny
from tests.joint_models import on_joint_models
from tests.methods import sampling
from tests.parts import Tiny
from tests.subjects.material import LEFT, PROMPT, draw, latents, middle, picture, two
from tests.transformers import draw as draw_joint


def test_the_formula() -> None:
    target = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    got = adain(target, torch.tensor([10.0, 5.0]), torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(got, torch.tensor([[8.0, 12.0], [5.0, 5.0]]), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_a_subject_ends_with_the_statistics_of_its_reference(scheduler: str) -> None:
    pipe, subjects = tiny.sd(scheduler), two()
    stock, drawn = draw(pipe, subjects), draw(pipe, subjects, MaskedAdaIN(subjects))
    rows = References.of(sampling([PROMPT, "cat", "dog"]), subjects, "it")
    with torch.no_grad():
        fitted = [one.fitted(16, 16).picture for _, one in rows.all]
        pixels = pipe.image_processor.preprocess(fitted, height=32, width=32)
        clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    nobodys = torch.ones(256, dtype=torch.bool)
    for number in range(2):
        cells = rows.cells(number, (1, 16, 16), torch.device("cpu"))
        nobodys[cells] = False
        got, wanted = drawn[0].flatten(1)[:, cells], clean[number].flatten(1)[:, cells]
        torch.testing.assert_close(got.mean(dim=1), wanted.mean(dim=1), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(got.std(dim=1), wanted.std(dim=1), atol=1e-2, rtol=1e-2)
        assert not torch.allclose(stock[0].flatten(1)[:, cells].mean(dim=1), wanted.mean(dim=1), atol=1e-2)
    assert nobodys.any()
    torch.testing.assert_close(drawn[1:], stock[1:], atol=1e-5, rtol=1e-5)


def test_another_subjects_pixels_do_not_reach_a_region() -> None:
    late: dict[str, Any] = {"window": ac.Window(0.6, 1.0)}  # the last of three steps: nothing spreads any more
    one, other = two(), two(second=9)
    first, second = (draw(tiny.sd(), each, MaskedAdaIN(each, **late))[0].flatten(1) for each in (one, other))
    left = torch.zeros(16, 16, dtype=torch.bool)
    left[:, :8] = True
    torch.testing.assert_close(first[:, left.flatten()], second[:, left.flatten()], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first[:, ~left.flatten()], second[:, ~left.flatten()], atol=1e-3)


def test_without_a_region_it_is_where_the_word_is_attended_to() -> None:
    pipe, subjects = tiny.sd(), two(placed=False)
    stock, drawn = draw(pipe, subjects), draw(pipe, subjects, MaskedAdaIN(subjects))
    assert torch.isfinite(drawn).all()
    assert not torch.allclose(drawn[0], stock[0], atol=1e-3)
    still = (ac.Subject("cat", picture(1), middle(), LEFT, reposition=False),)
    drawn = draw(pipe, still, MaskedAdaIN(still, window=ac.Window(0.6, 1.0)))
    changed = (drawn[0] - draw(pipe, still)[0]).abs().amax(dim=0) > 1e-4
    assert changed[:, :8].all()
    assert not changed[:, 8:].any()


def test_asked_for_nothing_it_is_the_stock_run() -> None:
    pipe, nobody = tiny.sd(), two(strength=0.0)
    assert torch.equal(draw(pipe, nobody, MaskedAdaIN(nobody)), draw(pipe, nobody))
    assert MaskedAdaIN(two(), share=0.0).idle


def test_a_picture_with_its_references_prompt_is_no_reference() -> None:
    pipe = tiny.sd()
    cat = (ac.Subject("cat", picture(1), middle(), LEFT, prompt=PROMPT),)
    with ac.control(pipe, MaskedAdaIN(cat), record=False):
        alone = tiny.draw(pipe, [PROMPT], latents=latents(2)[:1])
    torch.testing.assert_close(alone[0], draw(pipe, cat, MaskedAdaIN(cat))[0], atol=1e-5, rtol=1e-5)


def test_it_goes_with_other_methods() -> None:
    pipe, subjects = tiny.sd(), two()
    keep = ac.DrawReferences(subjects)
    magic = ac.MagicFace(subjects, from_layer=0.0)
    both = draw(pipe, subjects, keep, magic, MaskedAdaIN(subjects))
    assert not torch.allclose(both[0], draw(pipe, subjects, keep, magic)[0], atol=1e-3)


@on_joint_models
def test_joint_attention(family: Tiny) -> None:
    pipe, subjects = family.make(), two()

    def drawn(*controls: ac.Control) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(i) for i in range(3)]
        with ac.control(pipe, *controls, record=False):
            return draw_joint(pipe, family, [PROMPT, "cat", "dog"], generator=seeds)

    stock, changed = drawn(), drawn(MaskedAdaIN(subjects))
    torch.testing.assert_close(changed[1:], stock[1:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(changed[0], stock[0], atol=1e-3)
