"""Attention under sparse blocks: the reference is masked softmax, and every other form is held to the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

from attnctrl.kernels import attention, blocks_flex, blocks_gather
from attnctrl.kernels import blocks_reference as reference
from attnctrl.kernels.blocks import SparseBlocks

from .block_masks import MASKS, band, random_blocks
from .masks import tensors, zero_where_blind

SCALE = 0.3


def results(attend: Callable[..., Any], inputs: list[torch.Tensor], mask: SparseBlocks) -> list[torch.Tensor]:
    """Output, log-sum-exp, and the gradients of query, key and value for gradients in both."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output, lse = attend(*leaves, mask, SCALE)
    generator = torch.Generator().manual_seed(7)
    into_output, into_lse = (torch.randn(t.shape, generator=generator).to(t) for t in (output, lse))
    loss = (output * into_output).sum() + (zero_where_blind(lse) * into_lse).sum()
    return [output.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def test_the_reference_is_masked_softmax() -> None:
    mask = random_blocks(70, 53, 0.8)
    inputs = tensors(2, 2, 70, 53, 8)
    allowed = mask.visited.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :70, :53]
    assert allowed.any(dim=-1).all()
    output, lse = reference.block_attention(*inputs, mask, SCALE)
    torch.testing.assert_close(output, attention(*inputs, allowed, SCALE))
    scores = inputs[0] @ inputs[1].transpose(-1, -2) * SCALE
    torch.testing.assert_close(lse, scores.masked_fill(~allowed, float("-inf")).logsumexp(dim=-1))


@pytest.mark.parametrize("name", MASKS)
def test_the_gathered_form_and_its_gradients_agree_with_the_reference(name: str) -> None:
    mask = MASKS[name]
    inputs = tensors(2, 2, mask.queries, mask.keys, 8)
    for mine, exact in zip(
        results(blocks_gather.block_attention, inputs, mask),
        results(reference.block_attention, inputs, mask),
        strict=True,
    ):
        torch.testing.assert_close(mine, exact)
    output, lse = blocks_gather.block_attention(*inputs, mask, SCALE, with_lse=False)
    assert lse is None
    torch.testing.assert_close(output, reference.block_attention(*inputs, mask, SCALE)[0])


def test_values_may_be_of_another_width() -> None:
    mask = MASKS["random"]
    query, key, _ = tensors(2, 2, mask.queries, mask.keys, 8)
    inputs = [query, key, torch.randn(2, 2, mask.keys, 20, generator=torch.Generator().manual_seed(3))]
    exact = results(reference.block_attention, inputs, mask)
    for mine, other in zip(results(blocks_gather.block_attention, inputs, mask), exact, strict=True):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(blocks_gather.block_attention(*inputs, mask, SCALE, with_lse=False)[0], exact[0])


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_are_taken_together_or_one_by_one(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_gather, "GATHERED", rows * 3 * 16 * 8)
    mask = random_blocks(70, 53, 0.6, (2, 2))
    inputs = tensors(2, 2, 70, 53, 8)
    taken = list(blocks_gather.gathered(mask, (2, 2), 8))
    assert max(len(one.query) for one in taken) >= rows
    assert sum(len(one.query) for one in taken) == int(mask.visited.any(dim=-1).sum())
    torch.testing.assert_close(
        blocks_gather.block_attention(*inputs, mask, SCALE), reference.block_attention(*inputs, mask, SCALE)
    )


def test_the_gathered_form_has_exact_gradients() -> None:
    mask = band(18, 20, 3)
    mask = mask.hide_keys(torch.arange(20)[None] == 1)
    inputs = [tensor.double().requires_grad_() for tensor in tensors(1, 1, 18, 20, 2)]

    def both(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse = blocks_gather.block_attention(*inputs, mask, SCALE)
        assert lse is not None
        return output, zero_where_blind(lse)

    assert gradcheck(both, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["random", "per sample and head", "band, hidden per sample", "segments, hidden"])
def test_flex_agrees_with_the_reference(name: str) -> None:
    mask = MASKS[name]
    inputs = tensors(2, 2, mask.queries, mask.keys, 16)
    exact = reference.block_attention(*inputs, mask, SCALE)
    torch.testing.assert_close(blocks_flex.block_attention(*inputs, mask, SCALE, with_lse=True), exact)
    output, lse = blocks_flex.block_attention(*inputs, mask, SCALE)
    assert lse is None
    torch.testing.assert_close(output, exact[0])


def test_half_precision_is_summed_in_single() -> None:
    mask, inputs = random_blocks(70, 53), tensors(1, 2, 70, 53, 16, torch.bfloat16)
    output, lse = blocks_gather.block_attention(*inputs, mask, SCALE)
    exact = reference.block_attention(*(tensor.float() for tensor in inputs), mask, SCALE)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(lse, exact[1])
    torch.testing.assert_close(output, exact[0].bfloat16())


def test_complementary_masks_merge_to_dense_attention() -> None:
    mask, inputs = random_blocks(70, 53), tensors(1, 2, 70, 53, 8)
    rest = SparseBlocks(~mask.visited, mask.query_axis, mask.key_axis)
    (one, first), (two, second) = (blocks_gather.block_attention(*inputs, part, SCALE) for part in (mask, rest))
    assert first is not None
    assert second is not None
    weight = torch.sigmoid(first - second)[..., None]
    torch.testing.assert_close(weight * one + (1 - weight) * two, attention(*inputs, None, SCALE))


def test_full_and_partial_splits_of_one_mask_agree() -> None:
    mask, inputs = random_blocks(64, 48, 0.6), tensors(1, 1, 64, 48, 8)
    twice = torch.ones(2, 16, 16, dtype=torch.bool)  # the second says in full what the first does by its number
    number = torch.ones(mask.visited.shape, dtype=torch.int32)
    partial = SparseBlocks(mask.visited, mask.query_axis, mask.key_axis, pattern=number, patterns=twice)
    one, two = (blocks_gather.block_attention(*inputs, m, SCALE) for m in (mask, partial))
    torch.testing.assert_close(one, two)


def test_masks_made_under_inference_mode_serve_training() -> None:
    with torch.inference_mode():
        mask = band(37, 37, 5)
        blocks_gather.block_attention(*tensors(1, 1, 37, 37, 8), mask, SCALE)
    inputs = [tensor.requires_grad_() for tensor in tensors(1, 1, 37, 37, 8)]
    blocks_gather.block_attention(*inputs, mask, SCALE)[0].sum().backward()
    assert all(tensor.grad is not None for tensor in inputs)


@pytest.mark.parametrize(
    ("shape", "mask", "sentence"),
    [
        ((1, 2, 6, 7), random_blocks(5, 7), "for 5 queries x 7 keys, the attention has 6 x 7"),
        ((1, 2, 5, 7), random_blocks(5, 7, planes=(2, 1)), "for a batch of 2, the attention has 1"),
        ((1, 2, 5, 7), random_blocks(5, 7, planes=(1, 3)), "for heads of 3, the attention has 2"),
    ],
)
def test_masks_that_do_not_fit_are_refused(shape: tuple, mask: SparseBlocks, sentence: str) -> None:
    for form in (reference, blocks_gather, blocks_flex):
        with pytest.raises(ValueError, match=sentence):
            form.block_attention(*tensors(*shape, 4), mask, SCALE)
