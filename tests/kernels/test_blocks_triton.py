"""The Triton kernels for sparse blocks against the float32 reference: in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from attnctrl.kernels import blocks_reference as reference
from attnctrl.kernels.blocks import SparseBlocks
from attnctrl.kernels.blocks_autograd import block_attention, block_tiles
from attnctrl.kernels.groups_autograd import INTERPRETED
from attnctrl.kernels.launch import Tile, Tiles

from .block_masks import MASKS, band, hidden, random_blocks
from .masks import tensors
from .test_blocks_attention import SCALE, results

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SINGLE, HALF, BRAIN = 2e-5 if DEVICE == "cuda" else 3e-6, 2e-3, 1.5e-2
"""A few roundings of each element type."""

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1")


def compare(inputs: list[torch.Tensor], mask: SparseBlocks, tolerance: float, tiles: Tiles | None = None) -> None:
    """Both directions, relative to the largest entry of what the reference makes of the same values in float32."""
    inputs, mask = [tensor.to(DEVICE) for tensor in inputs], mask.to(DEVICE)
    found = results(lambda *a: block_attention(*a, tiles=tiles), inputs, mask)
    exact = results(reference.block_attention, [tensor.float() for tensor in inputs], mask)
    for name, mine, wanted in zip(("output", "lse", "query", "key", "value"), found, exact, strict=True):
        assert mine.dtype == (torch.float32 if name == "lse" else inputs[0].dtype)
        blind = wanted == float("-inf")
        assert torch.equal(blind, mine == float("-inf")), name
        error = (mine.float() - wanted).masked_fill(blind, 0.0).abs().max()
        assert error <= tolerance * max(1.0, float(wanted.masked_fill(blind, 0.0).abs().max())), (name, float(error))


@pytest.mark.parametrize("name", MASKS)
def test_both_directions_agree_with_the_reference(name: str) -> None:
    mask = MASKS[name]
    compare(tensors(2, 2, mask.queries, mask.keys, 16), mask, SINGLE)


PARTS = Tiles(Tile(16, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1))
"""Smaller than the blocks below, in different ways in each kernel."""


@pytest.mark.parametrize(
    "mask",
    [
        band(70, 77, 30, (64, 32)).hide_keys(hidden(77)),
        random_blocks((10, 70), (40, 37), 0.7, (1, 2), (32, 64)),
        random_blocks(70, 77, 0.6, (1, 1), (32, 32)),
    ],
)
def test_tiles_may_be_parts_of_blocks(mask: SparseBlocks) -> None:
    compare(tensors(1, 2, mask.queries, mask.keys, 16), mask, SINGLE, PARTS)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, BRAIN), (torch.float16, HALF)])
def test_half_precision_agrees_with_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    compare(tensors(2, 2, 70, 53, 16, dtype), MASKS["band, hidden per sample"], tolerance)


def test_heads_of_other_sizes_are_padded() -> None:
    compare(tensors(1, 2, 37, 53, 20), random_blocks(37, 53), SINGLE)


def test_strides_are_free() -> None:
    # (batch, tokens, heads, head_dim) in memory; head_dim not innermost; a broadcast head.
    query = tensors(2, 37, 2, 2, 16)[0].transpose(1, 2)
    key = tensors(2, 2, 16, 16, 53)[0].transpose(2, 3)
    value = tensors(2, 1, 53, 53, 16)[0].expand(2, 2, 53, 16)
    assert not any(tensor.is_contiguous() for tensor in (query, key, value))
    compare([query, key, value], random_blocks(37, 53, planes=(2, 2)), SINGLE)


def test_large_scores_do_not_overflow() -> None:
    query, key, value = tensors(1, 1, 37, 53, 16)
    # The hidden keys score highest by far: their probabilities, which are computed and then hidden, overflow.
    compare([100 * query, key, value], band(37, 53, 9), 1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter, about the NaN
def test_absent_blocks_are_not_read() -> None:
    query, key, value = (tensor.to(DEVICE) for tensor in tensors(1, 1, 48, 48, 16))
    visited = torch.eye(3, dtype=torch.bool, device=DEVICE)[None, None]
    axis = random_blocks(48, 48).query_axis
    mask = SparseBlocks(visited, axis, axis)
    exact = reference.block_attention(query, key, value, mask, SCALE)[0]
    key[:, :, 16:], value[:, :, 16:] = float("nan"), float("nan")
    output, _ = block_attention(query, key, value, mask, SCALE)
    torch.testing.assert_close(output[:, :, :16], exact[:, :, :16])


def test_gradients_are_the_same_in_every_run() -> None:
    mask = MASKS["per head"].to(DEVICE)
    inputs = [tensor.to(DEVICE) for tensor in tensors(1, 2, mask.queries, mask.keys, 16)]
    for first, second in zip(*(results(block_attention, inputs, mask) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("block", [16, 64, 128])
def test_tiles_divide_the_blocks(block: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in (16, 64, 128, 256):
            for capability in (80, 86, 90, 100, 120):
                tiles = block_tiles(head_dim, dtype, capability, block, block)
                for tile in (tiles.forward, tiles.query, tiles.key_value):
                    assert block % tile.queries == block % tile.keys == 0
                    assert min(tile.queries, tile.keys) >= 16


@pytest.mark.slow
@pytest.mark.parametrize(("block", "head_dim"), [(64, 64), (128, 128)])
def test_the_tiles_of_the_table_agree_with_the_reference(block: int, head_dim: int) -> None:
    mask = band(150, 170, 60, (block, block))
    compare(tensors(1, 1, 150, 170, head_dim, torch.bfloat16), mask, BRAIN)


def test_without_a_gpu_or_the_interpreter_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnctrl.kernels.groups_autograd.INTERPRETED", False)
    with pytest.raises(ValueError, match="CUDA device"):
        block_attention(*tensors(1, 1, 2, 2, 16), random_blocks(2, 2), SCALE)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [40, 64, 72, 128, 160])
def test_every_head_dim_on_the_gpu(head_dim: int, dtype: torch.dtype) -> None:
    tolerance = {torch.float16: HALF, torch.bfloat16: BRAIN, torch.float32: SINGLE}[dtype]
    for block in (64, 128):
        mask = random_blocks((70, 333), 517, 0.5, (2, 3), (block, block)).hide_keys(hidden(517, 2))
        compare(tensors(2, 3, 403, 517, head_dim, dtype), mask, tolerance)
