"""Columns of the attention map from the log-sum-exp: the same numbers and gradients as the whole map's."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from attnctrl.kernels import (
    TokenGroups,
    attention_with_lse,
    chunked,
    column_probabilities,
    group_attention,
    probabilities,
)

from .masks import random_groups, tensors

SCALE = 0.4
CHOSEN = torch.tensor([5, 0, 3])


@pytest.mark.parametrize("masked", [False, True])
def test_columns_are_those_of_the_whole_map(masked: bool) -> None:
    query, key, value = tensors(2, 3, 70, 9, 8)
    groups = random_groups(70, 9, 3, 0.4, (2, 1)) if masked else TokenGroups.everything(70, 9)
    _, lse = group_attention(query, key, value, groups, SCALE, return_lse=True)
    columns = column_probabilities(query, key[:, :, CHOSEN], lse, SCALE, groups.visible(CHOSEN) if masked else None)
    whole = probabilities(query, key, groups.dense(), SCALE).nan_to_num(0.0)  # rows that see nothing
    assert columns.shape == (2, 3, 70, 3)
    torch.testing.assert_close(columns, whole[..., CHOSEN])


def test_hidden_keys_that_score_high_are_zero_and_so_is_their_gradient() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in tensors(1, 1, 6, 4, 8))
    groups = TokenGroups(torch.tensor([[1, 1, 1, 2, 0, 1]]), torch.tensor([[1, 2, 1, 2]]))
    _, lse = group_attention(query, key * 1000, value, groups, SCALE, return_lse=True)
    every = torch.arange(4)
    columns = column_probabilities(query, key * 1000, lse, SCALE, groups.visible(every))
    assert (columns[~groups.dense().expand_as(columns)] == 0).all()
    columns.square().sum().backward()
    assert all(t.grad is None or t.grad.isfinite().all() for t in (query, key, value))


def test_half_precision_scores_are_not_rounded() -> None:
    query, key, value = tensors(1, 2, 40, 30, 64, torch.bfloat16)
    _, lse = attention_with_lse(query, key, value, None, SCALE)
    columns = column_probabilities(query, key[:, :, CHOSEN], lse, SCALE)
    assert columns.dtype == torch.float32
    exact = probabilities(query.float(), key.float(), None, SCALE)[..., CHOSEN]
    torch.testing.assert_close(columns, exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_through_the_sum_are_exact(masked: bool) -> None:
    inputs = [tensor.double().requires_grad_() for tensor in tensors(2, 1, 5, 6, 3)]
    groups = random_groups(5, 6, 2, 0.4, (2, 1))
    mask, visible = (groups, groups.visible(CHOSEN)) if masked else (None, None)

    def columns(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        _, lse = chunked.attention(query, key, value, mask, SCALE, chunk=2)
        return column_probabilities(query, key[:, :, CHOSEN], lse, SCALE, visible)

    # The value has no part in the map: its gradient is 0, which gradcheck confirms like the others.
    assert gradcheck(columns, inputs)


@pytest.mark.parametrize("form", [None, "reference", "triton", "merge"])
def test_a_loss_on_columns_has_the_gradient_of_the_materialised_map(form: str | None) -> None:
    if form == "triton":
        pytest.importorskip("triton")
        from attnctrl.kernels.groups_autograd import INTERPRETED

        if not INTERPRETED:
            pytest.skip("needs TRITON_INTERPRET=1; tests on the GPU are in test_groups_triton")
    groups = random_groups(20, 12, 3, 0.5)
    weights = torch.linspace(-1, 1, 20)[:, None]
    found = []
    for materialised in (False, True):
        query, key, value = (tensor.requires_grad_() for tensor in tensors(1, 2, 20, 12, 16))
        if materialised:
            scores = (query @ key.transpose(-1, -2) * SCALE).masked_fill(~groups.dense(), -1e9)
            seeing = groups.dense().any(dim=-1, keepdim=True)
            chosen = (scores.softmax(dim=-1) * seeing)[..., CHOSEN]
        else:
            _, lse = group_attention(query, key, value, groups, SCALE, return_lse=True, form=form)
            chosen = column_probabilities(query, key[:, :, CHOSEN], lse, SCALE, groups.visible(CHOSEN))
        found.append(torch.autograd.grad((chosen.square() * weights).sum(), (query, key)))
    torch.testing.assert_close(found[0], found[1])
