"""A bias of low rank is an additive mask, in every form of the attention; the value keeps its own head_dim."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from attnctrl.kernels import (
    LowRankBias,
    TokenGroups,
    attention,
    attention_with_lse,
    chunked,
    group_attention,
    mean_columns,
    probabilities,
)

from .masks import random_groups, tensors

SCALE = 0.3


def bias(queries: int, keys: int, rank: int = 3, dtype: torch.dtype = torch.float32) -> LowRankBias:
    generator = torch.Generator().manual_seed(5)
    sides = (torch.randn(batch, tokens, rank, generator=generator) for batch, tokens in ((2, queries), (1, keys)))
    return LowRankBias(*(side.to(dtype) for side in sides))


def test_by_hand() -> None:
    """Query 0 gets 6 for key 1 and -2 for key 2, query 1 nothing."""
    found = LowRankBias(torch.tensor([[[6.0, -2.0], [0.0, 0.0]]]), torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]))
    assert found.dense().tolist() == [[[[0.0, 6.0, -2.0], [0.0, 0.0, 0.0]]]]
    query, key, _ = tensors(1, 2, 2, 3, 4)
    wide_query, wide_key = found.added(query, key, SCALE)
    assert wide_query.shape == (1, 2, 2, 6)
    assert wide_key.shape == (1, 2, 3, 6)
    logits = query @ key.transpose(-1, -2) * SCALE + found.dense()
    torch.testing.assert_close(wide_query @ wide_key.transpose(-1, -2) * SCALE, logits)


def test_sides_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="of one rank"):
        LowRankBias(torch.zeros(1, 4, 2), torch.zeros(1, 5, 3))
    with pytest.raises(ValueError, match="of one rank"):
        LowRankBias(torch.zeros(2, 4, 2), torch.zeros(3, 5, 2))


def test_every_attention_adds_it() -> None:
    query, key, value = tensors(2, 3, 37, 29, 8)
    added = bias(37, 29)
    wide = added.added(query, key, SCALE)
    exact = probabilities(query, key, added.dense(), SCALE)
    torch.testing.assert_close(attention(*wide, value, None, SCALE), exact @ value)
    output, lse = attention_with_lse(*wide, value, None, SCALE)
    torch.testing.assert_close(output, exact @ value)
    chosen = [4, 0]
    columns = mean_columns(wide[0], wide[1][:, :, chosen], lse, SCALE)
    torch.testing.assert_close(columns, exact[..., chosen].mean(dim=1, keepdim=True))


@pytest.mark.parametrize("form", [None, "reference", "merge", "flex"])
def test_every_form_under_token_groups_adds_it(form: str | None) -> None:
    query, key, value = tensors(2, 3, 37, 29, 8)
    groups, added = random_groups(37, 29, 3, 0.6), bias(37, 29)
    hidden = torch.zeros(1, 1, 37, 29).masked_fill(~groups.dense(), float("-inf"))
    exact = probabilities(query, key, added.dense() + hidden, SCALE).nan_to_num(0.0) @ value
    wide = added.added(query, key, SCALE)
    torch.testing.assert_close(group_attention(*wide, value, groups, SCALE, form=form), exact)
    output, _ = group_attention(*wide, value, groups, SCALE, return_lse=True, form=form)
    torch.testing.assert_close(output, exact)
    assert output.shape == (*value.shape[:2], 37, 8)


@pytest.mark.parametrize("widths", [(5, 3), (3, 5)])
def test_gradients_with_two_widths(widths: tuple[int, int]) -> None:
    query, key, _ = (tensor.double().requires_grad_() for tensor in tensors(1, 2, 5, 6, widths[0]))
    value = tensors(1, 2, 5, 6, widths[1])[2].double().requires_grad_()
    groups = random_groups(5, 6, 2, 0.7)
    for mask in (None, groups):
        assert gradcheck(lambda *t, mask=mask: chunked.attention(*t, mask, SCALE, chunk=2)[0], (query, key, value))
    assert gradcheck(lambda *t: attention(*t, None, SCALE), (query, key, value))
    assert gradcheck(lambda *t: group_attention(*t, groups, SCALE, form="merge"), (query, key, value))


def test_in_half_precision_a_boost_of_the_default_is_close() -> None:
    query, key, value = tensors(1, 2, 9, 30, 128, torch.bfloat16)
    inside = (torch.arange(9) < 4).float()[None, :, None]
    word = (torch.arange(30) == 3).float()[None, :, None]
    added = LowRankBias(6 * inside, word, TokenGroups.everything(9, 30))
    scale = 128**-0.5
    wide = added.added(query, key, scale)
    exact = attention(query.float(), key.float(), value.float(), added.dense(), scale)
    torch.testing.assert_close(attention(*wide, value, None, scale).float(), exact, atol=2e-2, rtol=2e-2)
