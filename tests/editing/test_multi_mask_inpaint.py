"""Rectified cross-attention against its card."""

from __future__ import annotations

import torch

import attnctrl as ac
from attnctrl.controls.editing.multi_mask_inpaint import seen_words
from tests import tiny
from tests.probes import REGIONS


def test_what_a_pixel_sees_by_hand() -> None:
    # Text: start, a, b, and; pixels: in a, in b, in both, in none.
    tokens = torch.tensor([[[0, 1, 0, 0], [0, 0, 1, 0]]]).bool()
    inside = torch.tensor([[[1, 0, 1, 0], [0, 1, 1, 0]]]).bool()
    assert seen_words(tokens, inside)[0].int().tolist() == [[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_one_region_changes_nothing() -> None:
    """Inside it sees its own words, outside everything."""
    pipe = tiny.inpaint()
    expected = tiny.redraw(pipe)
    with ac.control(pipe, ac.MultiMaskInpaint(REGIONS[:1])):
        torch.testing.assert_close(tiny.redraw(pipe), expected, atol=1e-5, rtol=1e-5)


def test_two_regions_do() -> None:
    pipe = tiny.inpaint()
    expected = tiny.redraw(pipe)
    with ac.control(pipe, ac.MultiMaskInpaint(REGIONS)):
        assert not torch.allclose(tiny.redraw(pipe), expected, atol=1e-4)
