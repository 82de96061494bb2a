"""Attention under control never allocates tokens x tokens: one FLUX-sized layer, forward and backward, watched.

Only controls that ask for scores or probabilities materialise them. PyTorch's own fused attention counts as fused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.layout.entities import Entities
from attnctrl.kernels import TokenGroups
from attnctrl.processors.attend import attend, observe_only
from attnctrl.sites import Call
from tests.joint import SITE, joint_call, work
from tests.methods import sampling
from tests.probes import REGIONS, Mask, Scores
from tests.watch import Largest

GRID, TEXT, HEADS, HEAD_DIM = (1, 64, 64), 512, 2, 64
TOKENS = TEXT + 64 * 64
CAP = HEADS * TOKENS * (HEAD_DIM + TEXT)
"""Elements of one tensor: tokens x (head_dim + recorded tokens) per head; one head's scores are four times as many."""

JOINT = ac.Where(kinds=("joint",))
ENTITIES = ac.EliGen(REGIONS, entity_tokens=64)
PADDING = (torch.arange(TOKENS) < TEXT - 40) | (torch.arange(TOKENS) >= TEXT)


def rows(call: Call) -> TokenGroups:
    """The upper and the lower half of the picture apart, both with all text."""
    upper = torch.arange(TOKENS) < TEXT + 32 * 64
    lower = ~upper | (torch.arange(TOKENS) < TEXT)
    return TokenGroups.from_members(torch.stack([upper, lower], dim=-1)[None])


def watched(*controls: ac.Control, observed: bool = False, gradient: bool = False, padded: bool = False) -> int:
    """The largest tensor of one layer under these controls, the making of their masks included."""
    call = joint_call(GRID, TEXT, HEADS, HEAD_DIM, PADDING[None, None, None] if padded else None, gradient)
    given = replace(sampling(grid=GRID[1:]), sites=[SITE], text_tokens=TEXT - 2 * 64)
    maps: list[torch.Tensor] = []

    def observe(call: Call, shown: Any, mask: Any) -> None:
        maps.append(shown)

    with Largest() as watch:
        states = tuple(Entities.begin(given, REGIONS, JOINT) if c is ENTITIES else None for c in controls)
        job = work(call, *controls, states=states, observe=observe if observed else None)
        if not controls and not gradient:
            observe_only(call, job)
            output = call.value
        else:
            output = attend(call, job)
        if gradient:
            total = output.square().sum() + sum(shown[..., 3].sum() for shown in maps)
            grads = torch.autograd.grad(total, (call.query, call.key, call.value))
            assert all(torch.isfinite(grad).all() for grad in grads)
    assert len(maps) == observed
    assert torch.isfinite(output).all()
    return watch.elements


CASES: dict[str, tuple[tuple[ac.Control, ...], dict[str, bool]]] = {
    "groups": ((ENTITIES,), {}),
    "groups and padding": ((ENTITIES,), {"padded": True}),
    "two masks of groups": ((ENTITIES, Mask(make=rows)), {}),
    "two masks, observed": ((ENTITIES, Mask(make=rows)), {"observed": True}),
    "groups with gradients": ((ENTITIES,), {"observed": True, "gradient": True}),
    "columns": ((), {"observed": True}),
    "columns beside padding": ((), {"observed": True, "padded": True}),
    "columns with gradients": ((), {"observed": True, "gradient": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_tokens_by_tokens(name: str) -> None:
    controls, more = CASES[name]
    assert watched(*controls, **more) <= CAP


def test_the_watch_sees_what_edited_scores_allocate() -> None:
    assert watched(Scores()) >= HEADS * TOKENS**2
