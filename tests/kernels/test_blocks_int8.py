"""Query and key in 8 bits: the rounding, the mean key, and the kernel against the definition."""

from __future__ import annotations

import pytest
import torch

from attnctrl.kernels import block_attention
from attnctrl.kernels import blocks_reference as exact
from attnctrl.kernels.blocks_axis import BlockAxis
from attnctrl.kernels.blocks_int8 import quantise, reference, without_mean

from .block_masks import MASKS, random_blocks
from .masks import tensors

SCALE = 64**-0.5


def test_each_block_is_rounded_by_its_own_largest_number() -> None:
    axis = BlockAxis((16, 2), 16)
    tensor = torch.zeros(1, 1, 18, 2)
    tensor[0, 0, 3] = torch.tensor([-254.0, 5.2])
    tensor[0, 0, 16] = torch.tensor([0.5, 1.27])
    found = quantise(tensor, axis)
    torch.testing.assert_close(found.scale.flatten(), torch.tensor([2.0, 0.01]))
    assert found.values[0, 0, 3].tolist() == [-127, 3]
    assert found.values[0, 0, 16].tolist() == [50, 127]
    assert (found.restored(axis) - tensor).abs().max() <= 1.0
    assert not quantise(torch.zeros(1, 1, 18, 2), axis).values.any()


def test_results_are_those_of_the_exact_attention_but_for_the_rounding() -> None:
    mask = random_blocks(256, 256, 0.4, size=(64, 64))
    inputs = tensors(1, 2, 256, 256, 64, torch.float16)
    output, lse, form = block_attention(*inputs, mask, SCALE, with_lse=True, form="int8")
    wanted, sums = exact.block_attention(*(tensor.float() for tensor in inputs), mask, SCALE)
    assert form == "int8"
    assert torch.cosine_similarity(output.float().flatten(), wanted.flatten(), dim=0) >= 0.999
    assert (output - wanted).abs().sum() <= 0.05 * wanted.abs().sum()
    assert lse is not None
    seeing = sums != float("-inf")
    assert torch.equal(seeing, lse != float("-inf"))
    assert (lse - sums)[seeing].abs().max() <= 0.02


def test_a_key_common_to_all_costs_no_precision() -> None:
    mask = random_blocks(64, 64, 0.7, size=(64, 64))
    query, key, value = tensors(1, 1, 64, 64, 64)
    common = 30 * torch.ones(64)
    smooth, mean = without_mean(key + common)
    torch.testing.assert_close(smooth, key - key.mean(dim=2, keepdim=True), atol=1e-4, rtol=0)
    torch.testing.assert_close(mean, key.mean(dim=2, keepdim=True) + common)
    plain = exact.block_attention(query, key + common, value, mask, SCALE)
    found = block_attention(query, key + common, value, mask, SCALE, with_lse=True, form="int8")
    assert found.lse is not None
    assert (found.output - plain[0]).abs().max() <= 0.05
    seeing = plain[1] != float("-inf")
    assert (found.lse - plain[1])[seeing].abs().max() <= 0.05
    coarse = reference(*(quantise(t, mask.key_axis) for t in (query, key + common)), value, mask, SCALE)
    assert (coarse[0] - plain[0]).abs().max() > 2 * (found.output - plain[0]).abs().max()


@pytest.mark.parametrize("name", ["per sample and head", "band, hidden per sample", "segments, hidden", "nothing"])
def test_the_kernel_agrees_with_the_definition(name: str) -> None:
    pytest.importorskip("triton")
    from attnctrl.kernels.blocks_int8_triton import kernel
    from attnctrl.kernels.groups_autograd import INTERPRETED

    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mask = MASKS[name].to(device)
    query, key, value = (t.to(device) for t in tensors(2, 2, mask.queries, mask.keys, 32))
    quantised = quantise(query, mask.query_axis), quantise(key, mask.key_axis)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        found = kernel(*quantised, value.to(dtype), mask, 0.3)
        wanted = reference(*quantised, value.to(dtype), mask, 0.3)
        assert found[0].dtype == dtype
        torch.testing.assert_close(found[0], wanted[0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(found[1], wanted[1], atol=1e-4, rtol=1e-5)


def test_gradients_are_refused() -> None:
    inputs = [tensor.requires_grad_() for tensor in tensors(1, 1, 16, 16, 8)]
    with pytest.raises(ValueError, match="no gradients"):
        block_attention(*inputs, random_blocks(16, 16), SCALE, form="int8")
