"""No form but the reference allocates queries x keys: every tensor that is made is watched, forward and backward."""

from __future__ import annotations

import pytest
import torch

from attnctrl.kernels import TokenGroups, attention, attention_with_lse, column_probabilities, group_attention
from tests.watch import Largest

from .masks import tensors

TOKENS, HEAD_DIM, COLUMNS, HEADS = 1536, 32, 8, 2
SCALE = HEAD_DIM**-0.5
CAP = 4 * TOKENS * (HEAD_DIM + COLUMNS)
"""Elements of one tensor, per head: O(tokens x (head_dim + columns)); the scores would be ten times as many."""

INPUTS = (TOKENS, TOKENS - 100)


def regions() -> TokenGroups:
    """Four regions that see themselves and, like everyone, the first 64 tokens; these see all."""
    bits = [(1 << (1 + token * 4 // TOKENS)) | (1 if token < 64 else 32) for token in range(TOKENS)]
    query_bits = torch.tensor([[63 if token < 64 else (b | 1) for token, b in enumerate(bits)]])
    return TokenGroups(query_bits, torch.tensor([bits[: INPUTS[1]]]))


def largest(form: str | None) -> int:
    query, key, value = (t.requires_grad_() for t in tensors(1, HEADS, *INPUTS, HEAD_DIM))
    chosen = torch.arange(COLUMNS)
    with Largest() as watched:
        groups = regions()
        output, lse = group_attention(query, key, value, groups, SCALE, return_lse=True, form=form)
        columns = column_probabilities(query, key[:, :, chosen], lse, SCALE, groups.visible(chosen))
        (output.sum() + columns.square().sum()).backward()
    return watched.elements


def test_the_watch_sees_what_the_reference_allocates() -> None:
    assert largest("reference") >= HEADS * INPUTS[0] * INPUTS[1]


@pytest.mark.parametrize("form", [None, "merge"])
def test_token_groups_and_columns_stay_below_the_cap(form: str | None) -> None:
    assert largest(form) <= CAP * HEADS


def test_so_does_the_fused_attention_below_the_merge_form() -> None:
    query, key, value = (t.requires_grad_() for t in tensors(1, HEADS, *INPUTS, HEAD_DIM))
    with Largest() as watched:
        group_attention(query, key, value, regions(), SCALE, form="merge").sum().backward()
    assert watched.elements <= CAP * HEADS
    with Largest() as watched, torch.no_grad():
        group_attention(query, key, value, regions(), SCALE)
    assert watched.elements <= CAP * HEADS


@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_its_sum_stays_below_the_cap(masked: bool) -> None:
    query, key, value = (t.requires_grad_() for t in tensors(1, HEADS, *INPUTS, HEAD_DIM))
    mask = (torch.arange(INPUTS[1]) < 900)[None, None, None] if masked else None
    with Largest() as watched:
        output, lse = attention_with_lse(query, key, value, mask, SCALE)
        (output.sum() + lse.sum()).backward()
    assert watched.elements <= CAP * HEADS


def test_fused_attention_with_a_value_of_another_head_dim_stays_below_the_cap() -> None:
    query, key, value = (t.requires_grad_() for t in tensors(1, HEADS, *INPUTS, HEAD_DIM))
    with Largest() as watched:
        attention(query, key, value[..., :5], None, SCALE).sum().backward()
    assert watched.elements <= CAP * HEADS


def test_the_triton_form_stays_below_the_cap() -> None:
    # What its kernels make is in registers; this watches the tensors that are made for them.
    pytest.importorskip("triton")
    from attnctrl.kernels.groups_autograd import INTERPRETED
    from attnctrl.kernels.groups_autograd import group_attention as attend
    from attnctrl.kernels.launch import Tile, Tiles

    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    large = Tile(512, 512, 4, 1)  # few and large for the interpreter; the lists of tiles are smaller still
    query, key, value = (t.requires_grad_() for t in tensors(1, HEADS, *INPUTS, HEAD_DIM, device=device))
    tiles = Tiles(large, large, large) if INTERPRETED else None
    with Largest() as watched:
        output, lse = attend(query, key, value, regions().to(device), SCALE, tiles=tiles)
        (output.sum() + lse.sum()).backward()
    assert watched.elements <= CAP * HEADS
