"""DreamMatcher against its card."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attnctrl as ac
from attnctrl.controls.subjects.appearance_matching import cycle_error, nearest, principal
from tests import tiny
from tests.subjects.material import draw, latents, middle, picture, two


def matching(subjects: tuple[ac.Subject, ...], **params: Any) -> ac.Control:
    return ac.AppearanceMatching(subjects, from_layer=0.0, window=ac.Window(), **params)


def test_orthonormal_features_permuted() -> None:
    reference, order = torch.eye(4), torch.tensor([2, 0, 3, 1])
    target = reference[order]
    there, back = nearest(target, reference), nearest(reference, target)
    assert torch.equal(there, order)
    assert cycle_error(there, back, 4).tolist() == [0, 0, 0, 0]
    doubled = target.clone()
    doubled[3] = target[0]  # the last now matches what the first does, whose way back ends at the first
    there, back = nearest(doubled, reference), nearest(reference, doubled)
    assert cycle_error(there, back, 4).tolist() == [0, 0, 0, 3]
    assert cycle_error(there, back, 2)[3] == pytest.approx(2**0.5)


def test_a_shift_is_found() -> None:
    reference = torch.randn(8, 8, 5, generator=torch.Generator().manual_seed(0))
    target = reference.roll(2, dims=1)
    there = nearest(target.flatten(0, 1), reference.flatten(0, 1)).view(8, 8)
    columns = torch.arange(8).expand(8, 8)
    assert torch.equal(there % 8, (columns - 2) % 8)


def test_principal_components_keep_what_differs() -> None:
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(12, 2, generator=generator) @ torch.randn(2, 9, generator=generator)
    target, reference = principal(plane[:6], plane[6:], 2)
    assert target.shape == reference.shape == (6, 2)
    apart = torch.cdist(plane[:6], plane[6:])
    torch.testing.assert_close(torch.cdist(target, reference), apart, atol=1e-4, rtol=1e-4)


def test_a_picture_that_is_its_reference_stays() -> None:
    pipe = tiny.sd()
    alone = (ac.Subject("cat", picture(1), region=(0, 0, 1, 1)),)
    start = latents(1).repeat(2, 1, 1, 1)
    stock = draw(pipe, alone, prompts=["cat"], latents=start)
    torch.testing.assert_close(draw(pipe, alone, matching(alone), prompts=["cat"], latents=start), stock)


@pytest.mark.parametrize("placed", [True, False])
def test_values_change_and_references_stay(placed: bool) -> None:
    pipe, subjects = tiny.sd(), two(placed=placed)
    stock, drawn = draw(pipe, subjects), draw(pipe, subjects, matching(subjects, threshold=4.0))
    torch.testing.assert_close(drawn[1:], stock[1:], atol=1e-4, rtol=1e-4)
    assert torch.isfinite(drawn).all()
    assert placed is False or not torch.allclose(drawn[0], stock[0], atol=1e-4)


def test_asked_for_nothing_it_is_the_stock_run() -> None:
    pipe, subjects = tiny.sd(), two()
    stock = draw(pipe, subjects)
    assert torch.equal(draw(pipe, subjects, matching(subjects, threshold=0.0)), stock)
    absent = two(strength=0.0)
    assert torch.equal(draw(pipe, absent, matching(absent)), stock)


def test_only_the_subjects_part_of_a_reference_counts() -> None:
    """What stands outside of a reference's mask is given to nobody."""
    small = np.zeros((32, 32), bool)
    small[:2, :2] = True
    pipe = tiny.sd()
    masked = (ac.Subject("cat", picture(1), small, (0, 0, 1, 1), reposition=False),)
    whole = (ac.Subject("cat", picture(1), None, (0, 0, 1, 1), reposition=False),)
    stock = draw(pipe, masked)
    little = (draw(pipe, masked, matching(masked, threshold=4.0))[0] - stock[0]).abs().mean()
    much = (draw(pipe, whole, matching(whole, threshold=4.0))[0] - stock[0]).abs().mean()
    assert little < 0.5 * much
    assert middle().any()
