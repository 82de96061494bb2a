"""Joint attention that is observed: one pass over the keys gives map and output wherever one kernel makes both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from attnctrl.errors import ControlError
from attnctrl.kernels import TokenGroups, chunked, dispatch, probabilities
from attnctrl.processors.attend import attend
from attnctrl.sites import Call
from tests.joint import joint_call, work
from tests.probes import Mask, Output

GRID, TEXT = (1, 4, 4), 6
TOKENS = TEXT + 16
LEFT = torch.arange(TOKENS) % 4 < 2
TWO = TokenGroups.from_members(torch.stack([LEFT, ~LEFT], dim=-1)[None])
MANY = TokenGroups(torch.arange(1, TOKENS + 1)[None], torch.full((1, TOKENS), 2**TOKENS - 1))
"""More kinds of queries than the merge form takes, all of which see everything."""
MASKS: dict[str, Any] = {"none": None, "groups": TWO, "many kinds": MANY, "dense": TWO.dense()}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that were called, in order."""
    seen: list[str] = []

    def counted(owner: Any, name: str, label: str) -> None:
        stock = getattr(owner, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            seen.append(label)
            return stock(*args, **kwargs)

        monkeypatch.setattr(owner, name, count)

    counted(chunked, "attention", "chunked")
    counted(dispatch.groups_merge, "group_attention", "merge")
    counted(dispatch, "attention", "fused")
    return seen


def observed(call: Call, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the map."""
    maps: list[torch.Tensor] = []
    controls = (Output(),) if mask is None else (Mask(make=lambda call: mask),)
    output = attend(call, work(call, *controls, observe=lambda call, shown, mask: maps.append(shown)))
    (shown,) = maps
    return output, shown


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_map_and_output_are_those_of_the_mask(name: str, gradient: bool) -> None:
    call, mask = joint_call(GRID, TEXT, 2, 8, gradient=gradient), MASKS[name]
    output, shown = observed(call, mask)
    dense = mask.dense() if isinstance(mask, TokenGroups) else mask
    probs = probabilities(call.query, call.key, dense, call.scale)
    torch.testing.assert_close(output, probs @ call.value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shown, probs[:, :, TEXT:, :TEXT].mean(dim=1, keepdim=True), atol=1e-5, rtol=1e-5)
    if gradient:
        expected = torch.autograd.grad((probs @ call.value).square().sum() + probs[:, :, TEXT:, 0].sum(), call.query)
        found = torch.autograd.grad(output.square().sum() + call.query.shape[1] * shown[..., 0].sum(), call.query)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "gradient", "expected"),
    [
        ("none", False, ["chunked", "fused"]),
        ("dense", False, ["chunked", "fused"]),
        ("groups", False, ["chunked", "merge"]),
        ("many kinds", False, ["chunked"]),
        ("none", True, ["chunked"]),
        ("dense", True, ["chunked"]),
        ("groups", True, ["chunked"]),
        ("many kinds", True, ["chunked"]),
    ],
)
def test_the_attention_is_computed_once_where_one_kernel_gives_both(
    name: str, gradient: bool, expected: list[str], passes: list[str]
) -> None:
    observed(joint_call(GRID, TEXT, 2, 8, gradient=gradient), MASKS[name])
    assert passes == expected


@pytest.mark.parametrize("name", MASKS)
def test_observing_changes_no_bit_of_the_output(name: str) -> None:
    call, mask = joint_call(GRID, TEXT, 2, 8), MASKS[name]
    controls = (Output(),) if mask is None else (Mask(make=lambda call: mask),)
    assert torch.equal(observed(call, mask)[0], attend(call, work(call, *controls)))


def test_padding_beside_groups_is_hidden_once_for_all_layers() -> None:
    padding = (torch.arange(TOKENS) < TOKENS - 3)[None, None, None]
    made = []
    for _ in range(2):
        call = joint_call(GRID, TEXT, 2, 8, padding=padding[:1])
        output = attend(call, work(call, Mask(make=lambda call: TWO)))
        made.append(TWO.memo["padded"].result)
        probs = probabilities(call.query, call.key, TWO.dense() & padding, call.scale)
        torch.testing.assert_close(output, probs @ call.value, atol=1e-5, rtol=1e-5)
    assert made[0] is made[1]


def test_other_masks_beside_groups_are_refused() -> None:
    biased = joint_call(GRID, TEXT, 2, 8, padding=torch.full((1, 1, 1, TOKENS), 0.5))
    with pytest.raises(ControlError, match=r"block\.attn by token groups, beside which padding can only be hidden"):
        attend(biased, work(biased, Mask(make=lambda call: TWO)))
    call = joint_call(GRID, TEXT, 2, 8)
    dense = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool)
    with pytest.raises(ControlError, match=r"one control masks by token groups and another by a mask of shape"):
        attend(call, work(call, Mask(make=lambda call: TWO), Mask(make=lambda call: dense)))
