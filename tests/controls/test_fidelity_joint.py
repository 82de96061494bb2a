"""The fidelity methods on joint attention, where image tokens see text and image at once."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from tests.methods import busy
from tests.transformers import FAMILIES, draw

SUBJECTS = ("cat", "dog")
WITHOUT_SELF = {
    "conform": {},
    "divide-bind": {},
    "bundled-attention": {},
    "init-no": {"self_weight": 0.0, "iterations": 1},
    "dynamic-prompt": {"background_weight": 0.0},
    "opti-prune": {"self_weight": 0.0, "ratio": 0.0, "iterations": 1},
}


@pytest.mark.parametrize("name", WITHOUT_SELF)
def test_they_act_on_joint_attention(name: str) -> None:
    family = FAMILIES["flux"]
    pipe = family.make()
    stock = draw(pipe, family, steps=1)
    with ac.control(pipe, busy(name, SUBJECTS, **WITHOUT_SELF[name])) as run:
        drawn = draw(pipe, family, steps=1)
    assert torch.isfinite(drawn).all()
    assert not torch.equal(drawn, stock)
    assert run.report.rows


@pytest.mark.parametrize("name", ["init-no", "dynamic-prompt", "opti-prune"])
def test_terms_of_self_attention_are_refused_there(name: str) -> None:
    family = FAMILIES["flux"]
    pipe = family.make()
    given = {"ratio": 0.0} if name == "opti-prune" else {}
    with (
        pytest.raises(ac.ControlError, match=r"self-attention, which this model has not apart from the text's"),
        ac.control(pipe, busy(name, SUBJECTS, **given)),
    ):
        draw(pipe, family, steps=1)
