"""The reference kernels: the fused and the materialised form agree, masks mean what they say."""

from __future__ import annotations

import pytest
import torch

from attnctrl.kernels import attention, combine_masks, logits, probabilities


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


BOOLEAN = torch.tensor([True, False, True, True, False, True, True])[None, None, None].expand(2, 1, 5, 7)
MASKS = {
    "none": None,
    "boolean": BOOLEAN,
    "additive": torch.linspace(-2, 2, 7)[None, None, None].expand(2, 1, 5, 7),
    "per head": torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("mask", MASKS)
def test_the_two_forms_agree(mask: str) -> None:
    query, key, value = tensors()
    fused = attention(query, key, value, MASKS[mask], 0.3)
    torch.testing.assert_close(fused, probabilities(query, key, MASKS[mask], 0.3) @ value)


def test_scores_are_single_precision_and_scaled() -> None:
    query, key, _ = tensors(torch.bfloat16)
    scores = logits(query, key, None, 0.5)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, 0.5 * (query.float() @ key.float().transpose(-1, -2)), atol=0.02, rtol=0.02)


def test_an_additive_mask_may_be_of_another_precision() -> None:
    query, key, value = tensors(torch.bfloat16)
    assert attention(query, key, value, MASKS["additive"], 0.3).dtype == torch.bfloat16


def test_a_boolean_mask_hides() -> None:
    query, key, _ = tensors()
    probs = probabilities(query, key, BOOLEAN, 0.3)
    assert (probs[..., [1, 4]] == 0).all()
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(2, 3, 5))


def row(*values: bool | float) -> torch.Tensor:
    return torch.tensor([[[values]]])


def test_masks_are_combined() -> None:
    assert combine_masks([]) is None
    one, two = row(True, True, False), row(False, True, True)
    both = combine_masks([one, two])
    assert both is not None
    assert both.flatten().tolist() == [False, True, False]
    bias = combine_masks([row(0.5, 1.0, 2.0), row(1.0, 1.0, 1.0)])
    assert bias is not None
    assert bias.flatten().tolist() == [1.5, 2.0, 3.0]
    mixed = combine_masks([row(0.5, 1.0, 2.0), one])
    assert mixed is not None
    assert mixed.flatten().tolist() == [0.5, 1.0, float("-inf")]


def test_masks_that_together_hide_everything_hide_nothing() -> None:
    both = combine_masks([row(True, False), row(False, True)])
    assert both is not None
    assert both.flatten().tolist() == [True, True]
