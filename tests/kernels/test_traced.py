"""The operator that carries token groups through torch.compile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from attnctrl.kernels import TokenGroups, attention, group_attention, traced
from attnctrl.kernels.traced import number_of, numbered_group_attention

from .masks import random_groups, tensors

SCALE = 0.3
PADDING = (torch.arange(20) < 15)[None, None, None]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("padding", [None, PADDING])
def test_it_is_the_attention_under_the_mask_of_the_number(padding: torch.Tensor | None) -> None:
    groups, inputs = random_groups(20, 20, batch=(2, 1)), tensors(2, 3, 20, 20, 8)
    found = numbered_group_attention(*inputs, number_of(groups), padding, SCALE)
    seen = groups if padding is None else groups.padded(padding)
    torch.testing.assert_close(found, group_attention(*inputs, seen, SCALE, form="reference"), atol=1e-5, rtol=1e-5)
    assert found.is_contiguous()


def test_its_form_is_known_without_computing_it() -> None:
    groups, inputs = random_groups(20, 24), tensors(1, 2, 20, 24, 8)
    given = (*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs), number_of(groups), None, SCALE)
    torch.library.opcheck(numbered_group_attention, given, test_utils=("test_schema", "test_faketensor"))


def test_one_graph_serves_all_masks() -> None:
    query, key, value = tensors(1, 2, 20, 20, 8)

    def layer(query: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        return numbered_group_attention(2 * query, key, value, number, None, SCALE) + 1

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for groups in (random_groups(20, 20, density=0.6), TokenGroups.everything(20, 20)):
            expected = attention(2 * query, key, value, groups.dense(), SCALE) + 1
            torch.testing.assert_close(compiled(query, number_of(groups)), expected, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_number_lives_as_long_as_its_mask() -> None:
    groups = random_groups(4, 4)
    number = number_of(groups)
    assert number_of(groups) is number
    assert traced._NAMED[int(number)] is groups
    del groups
    assert int(number) not in traced._NAMED
