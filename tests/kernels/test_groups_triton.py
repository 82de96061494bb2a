"""The Triton kernels against the float32 reference: in the interpreter, or on the GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from attnctrl.kernels import TokenGroups, attention_with_lse, dispatch, group_attention
from attnctrl.kernels import groups_reference as reference
from attnctrl.kernels.groups_autograd import INTERPRETED
from attnctrl.kernels.groups_autograd import group_attention as triton_attention
from attnctrl.kernels.launch import Tile, Tiles, padded, tiles_for

from .masks import random_groups, tensors, zero_where_blind

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tiles(Tile(16, 16, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1))
"""Small enough for the interpreter to meet many tiles in little time, and of other shapes in each kernel."""
SCALE = 0.3

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1")

Results = list[torch.Tensor]


def results(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]], inputs: Results, groups: TokenGroups
) -> Results:
    """Output, log-sum-exp, and the gradients of query, key and value for gradients in both."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output, lse = attend(*leaves, groups, SCALE)
    assert lse is not None
    generator = torch.Generator().manual_seed(7)
    into_output = torch.randn(output.shape, generator=generator).to(output)
    into_lse = torch.randn(lse.shape, generator=generator).to(lse)
    loss = (output * into_output).sum() + (zero_where_blind(lse) * into_lse).sum()
    return [output.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def compare(inputs: Results, groups: TokenGroups, tolerance: float, tiles: Tiles | None = SMALL) -> None:
    """Both directions, relative to the largest entry of what the reference makes of the same values in float32."""
    inputs, groups = [tensor.to(DEVICE) for tensor in inputs], groups.to(DEVICE)
    found = results(lambda *a: triton_attention(*a, tiles=tiles), inputs, groups)
    exact = results(reference.group_attention, [tensor.float() for tensor in inputs], groups)
    for name, mine, wanted in zip(("output", "lse", "query", "key", "value"), found, exact, strict=True):
        assert mine.dtype == (torch.float32 if name == "lse" else inputs[0].dtype)
        blind = wanted == float("-inf")
        assert torch.equal(blind, mine == float("-inf")), name
        error = (mine.float() - wanted).masked_fill(blind, 0.0).abs().max()
        assert error <= tolerance * max(1.0, float(wanted.masked_fill(blind, 0.0).abs().max())), (name, float(error))


SINGLE, HALF, BRAIN = 2e-5 if DEVICE == "cuda" else 3e-6, 2e-3, 1.5e-2
"""A few roundings of each element type."""

CASES = {
    "odd lengths": ((1, 2, 37, 53, 16), random_groups(37, 53)),
    "one token": ((1, 1, 1, 1, 16), TokenGroups.everything(1, 1)),
    "one query of many keys": ((1, 1, 1, 70, 16), random_groups(1, 70, density=0.7)),
    "per sample": ((2, 1, 40, 33, 16), random_groups(40, 33, batch=(2, 2))),
    "queries per sample": ((2, 1, 33, 40, 16), random_groups(33, 40, batch=(2, 1))),
    "64 groups": ((1, 1, 37, 35, 16), random_groups(37, 35, 64, 0.1)),
    "everything": ((1, 1, 48, 40, 16), TokenGroups.everything(48, 40)),
    "nothing": ((1, 1, 20, 20, 16), TokenGroups(*(torch.zeros(1, 20, dtype=torch.int64) for _ in range(2)))),
    "padded head_dim": ((1, 2, 33, 20, 20), random_groups(33, 20)),
    "tokens of regions": (
        (1, 1, 64, 64, 16),
        # Two regions of 24 tokens apart, then 16 that all see: full, partial and skipped tiles.
        TokenGroups(torch.tensor([[1] * 24 + [2] * 24 + [7] * 16]), torch.tensor([[5] * 24 + [6] * 24 + [4] * 16])),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_both_directions_agree_with_the_reference(case: str) -> None:
    shape, groups = CASES[case]
    compare(tensors(*shape), groups, SINGLE)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, BRAIN), (torch.float16, HALF)])
def test_half_precision_agrees_with_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    compare(tensors(1, 2, 37, 53, 16, dtype), random_groups(37, 53), tolerance)


def test_strides_are_free() -> None:
    # (batch, tokens, heads, head_dim) in memory; head_dim not innermost; a broadcast head.
    query = tensors(2, 37, 2, 2, 16)[0].transpose(1, 2)
    key = tensors(2, 2, 16, 16, 53)[0].transpose(2, 3)
    value = tensors(2, 1, 53, 53, 16)[0].expand(2, 2, 53, 16)
    assert not any(tensor.is_contiguous() for tensor in (query, key, value))
    compare([query, key, value], random_groups(37, 53), SINGLE)


def test_the_output_keeps_the_layout_of_the_query() -> None:
    query = tensors(1, 20, 2, 2, 16)[0].transpose(1, 2).to(DEVICE)
    output, _ = triton_attention(query, query, query, TokenGroups.everything(20, 20, DEVICE), SCALE, tiles=SMALL)
    assert output.stride() == query.stride()


@pytest.mark.parametrize("widths", [(19, 16), (16, 20)])
def test_a_value_of_another_head_dim(widths: tuple[int, int]) -> None:
    query, key, _ = tensors(1, 2, 37, 53, widths[0])
    value = tensors(1, 2, 37, 53, widths[1])[2]
    compare([query, key, value], random_groups(37, 53), SINGLE)


def test_large_scores_do_not_overflow() -> None:
    query, key, value = tensors(1, 1, 20, 40, 16)
    groups = random_groups(20, 40)
    # The hidden keys score highest by far: their probabilities, which are computed and then hidden, overflow.
    compare([100 * query, key, value], groups, 1e-4)


def test_gradients_are_the_same_in_every_run() -> None:
    inputs, groups = [t.to(DEVICE) for t in tensors(1, 2, 37, 53, 16)], random_groups(37, 53).to(DEVICE)
    attend = lambda *a: triton_attention(*a, tiles=SMALL)  # noqa: E731
    for first, second in zip(results(attend, inputs, groups), results(attend, inputs, groups), strict=True):
        assert torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_tiles_of_the_table_agree_with_the_reference(head_dim: int) -> None:
    compare(tensors(1, 1, 150, 170, head_dim, torch.bfloat16), random_groups(150, 170), BRAIN, tiles=None)


def test_the_dispatcher_forces_it() -> None:
    inputs, groups = [t.to(DEVICE) for t in tensors(1, 1, 9, 9, 16)], random_groups(9, 9).to(DEVICE)
    found = group_attention(*inputs, groups, SCALE, return_lse=True, form="triton")
    torch.testing.assert_close(found, group_attention(*inputs, groups, SCALE, return_lse=True, form="reference"))


def test_without_a_gpu_or_the_interpreter_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnctrl.kernels.groups_autograd.INTERPRETED", False)
    with pytest.raises(ValueError, match="CUDA device"):
        triton_attention(*tensors(1, 1, 2, 2, 16), TokenGroups.everything(2, 2), SCALE)


def test_every_size_has_tiles() -> None:
    assert [padded(size) for size in (1, 40, 64, 72, 160, 256)] == [16, 64, 64, 128, 256, 256]
    with pytest.raises(ValueError, match="above 256"):
        padded(257)
    with pytest.raises(ValueError, match="float64"):
        tiles_for(64, torch.float64, 90)
    for dtype in (torch.float16, torch.float32):
        for capability in (75, 80, 86, 89, 90, 100, 103, 120):
            for size in (16, 64, 72, 128, 256):
                assert tiles_for(size, dtype, capability).forward.queries >= 16
    assert tiles_for(128, torch.bfloat16, 120) == tiles_for(128, torch.bfloat16, 86)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [40, 64, 72, 128, 160])
def test_every_head_dim_on_the_gpu(head_dim: int, dtype: torch.dtype) -> None:
    tolerance = {torch.float16: HALF, torch.bfloat16: BRAIN, torch.float32: SINGLE}[dtype]
    compare(tensors(2, 3, 333, 517, head_dim, dtype), random_groups(333, 517, 5, 0.2, (2, 1)), tolerance, tiles=None)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_unmasked_attention_on_the_gpu() -> None:
    inputs = tensors(1, 2, 300, 400, 64, torch.bfloat16, DEVICE)
    assert dispatch.triton_runs(inputs[0], inputs[2])
    exact = reference.group_attention(*inputs, TokenGroups.everything(300, 400, DEVICE), SCALE)
    for mask in (None, torch.ones(1, 1, 1, 400, dtype=torch.bool, device=DEVICE)):
        torch.testing.assert_close(attention_with_lse(*inputs, mask, SCALE), exact, atol=BRAIN, rtol=BRAIN)
