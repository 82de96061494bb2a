"""Layers with somebody else's processor."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from tests import tiny
from tests.probes import REGIONS, Foreign, Mask, Nudge, all_visible, only_first_key
from tests.spies import assert_restored, attention_layers, snapshot


def test_foreign_processors_are_left_working() -> None:
    pipe = tiny.sd()
    for layer in attention_layers(pipe, "cross").values():
        layer.set_processor(Foreign())
    expected, before = tiny.draw(pipe), snapshot(pipe)
    with ac.control(pipe):
        assert torch.equal(tiny.draw(pipe), expected)
    with ac.control(pipe, Mask(make=all_visible, where=ac.Where(kinds=("self",)))):
        torch.testing.assert_close(tiny.draw(pipe), expected, atol=1e-4, rtol=1e-4)
    with ac.control(pipe, Mask(make=only_first_key, where=ac.Where(kinds=("self",)))):
        assert not torch.allclose(tiny.draw(pipe), expected, atol=1e-4)
    with ac.control(pipe, Nudge(by=0.5)):
        assert not torch.allclose(tiny.draw(pipe), expected, atol=1e-2)
    assert_restored(before, pipe)


@pytest.mark.parametrize("control", [ac.RegionMask(REGIONS), ac.LoCo(REGIONS), ac.DenseDiffusion(REGIONS)])
def test_a_control_that_needs_a_foreign_layer_is_refused(control: ac.Control) -> None:
    pipe = tiny.sd()
    for layer in attention_layers(pipe, "cross").values():
        layer.set_processor(Foreign())
    before = snapshot(pipe)
    with (
        pytest.raises(ac.ControlError, match=rf"{control.name} needs cross-attention, which Foreign has .*attn2"),
        ac.control(pipe, control),
    ):
        pytest.fail("the block was entered")
    assert_restored(before, pipe)


def test_maps_of_layers_that_somebody_else_has_taken_over() -> None:
    pipe = tiny.sd()
    for layer in attention_layers(pipe, "cross").values():
        layer.set_processor(Foreign())
    with pytest.raises(ac.ControlError, match=r'"cat" cannot be recorded.*Foreign'), ac.control(pipe, record=["cat"]):
        tiny.draw(pipe)
