"""MasaCtrl against its card."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from attnctrl.sites import Step
from tests import tiny
from tests.editing.material import EDIT, SOURCE, call, draw, pair
from tests.joint_models import on_joint_models
from tests.parts import Tiny
from tests.transformers import draw as draw_joint


def test_keys_and_values_are_the_sources_queries_their_own() -> None:
    control = ac.MutualSelfAttention(from_layer=0.0)
    given = call("self")
    made = control.inputs(given, control.begin(pair()))
    assert torch.equal(made.key[1], given.key[0])
    assert torch.equal(made.value[1], given.value[0])
    assert torch.equal(made.query, given.query)
    assert torch.equal(made.key[0], given.key[0])


def test_layers_and_steps() -> None:
    control = ac.MutualSelfAttention()
    assert not control.acts(Step(3, 50, 0.0, 0.0), "cond", None)
    assert control.acts(Step(4, 50, 0.0, 0.0), "uncond", None)
    state = ac.MutualSelfAttention(from_layer=0.6).begin(pair())
    assert state.names == frozenset()  # of one self-attention site, 0.6 is that one


def test_the_source_does_not_notice_its_edit() -> None:
    pipe, control = tiny.sd(), ac.MutualSelfAttention(window=ac.Window(), from_layer=0.5)
    stock, edited = draw(pipe, [SOURCE, EDIT]), draw(pipe, [SOURCE, EDIT], control)
    assert torch.equal(edited[0], stock[0])
    assert not torch.allclose(edited[1], stock[1], atol=1e-4)


def test_equal_prompts_give_the_stock_picture() -> None:
    pipe = tiny.sd()
    control = ac.MutualSelfAttention(window=ac.Window(), from_layer=0.0)
    torch.testing.assert_close(draw(pipe, [SOURCE] * 2, control), draw(pipe, [SOURCE] * 2), atol=1e-6, rtol=1e-6)


@on_joint_models
def test_joint_attention_keeps_its_text(family: Tiny) -> None:
    pipe = family.make()
    seeds = {"generator": [torch.Generator().manual_seed(1) for _ in range(2)]}
    control = ac.MutualSelfAttention(window=ac.Window(), from_layer=0.0)
    stock = draw_joint(pipe, family, [SOURCE, EDIT], **seeds)
    seeds = {"generator": [torch.Generator().manual_seed(1) for _ in range(2)]}
    with ac.control(pipe, control, record=False):
        edited = draw_joint(pipe, family, [SOURCE, EDIT], **seeds)
    torch.testing.assert_close(edited[0], stock[0], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(edited[1], stock[1], atol=1e-4)


def test_it_needs_two_prompts() -> None:
    with pytest.raises(ac.ControlError, match="prompt=\\[source, edit\\]"):
        draw(tiny.sd(), [SOURCE], ac.MutualSelfAttention(), latents=None)
