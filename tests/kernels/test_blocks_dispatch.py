"""Which form runs under sparse blocks, that every one gives what the mask says, and that skipping pays on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from attnctrl.kernels import BlockAxis, SparseBlocks, attention, block_attention, blocks_dispatch
from attnctrl.kernels import blocks_reference as reference
from attnctrl.kernels.blocks_select import top_blocks

from .block_masks import MASKS, hidden, random_blocks
from .masks import tensors, zero_where_blind

SCALE = 0.3


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("name", ["per sample and head", "band, hidden per sample", "segments, hidden", "nothing"])
@pytest.mark.parametrize("form", [None, "gather", "masked", "reference"])
def test_forms_and_their_gradients_agree_with_the_reference(form: str | None, name: str, with_lse: bool) -> None:
    mask, found = MASKS[name], []
    for one in (form, "reference"):
        inputs = [tensor.requires_grad_() for tensor in tensors(2, 2, mask.queries, mask.keys, 8)]
        output, lse, ran = block_attention(*inputs, mask, SCALE, with_lse, form=one)
        assert ran == (one or "masked")  # so few blocks
        assert (lse is not None) == with_lse
        loss = (output * torch.linspace(-1, 1, 8)).sum()
        if lse is not None:
            loss = loss + (zero_where_blind(lse) * torch.linspace(0, 1, mask.queries)).sum()
        found.append([output, *([] if lse is None else [lse]), *torch.autograd.grad(loss, inputs)])
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("with_lse", [False, True])
def test_full_attention_hides_what_is_hidden_and_nothing_else(with_lse: bool) -> None:
    mask, inputs = random_blocks(70, 53, 0.9).hide_keys(hidden(53, 2)), tensors(2, 2, 70, 53, 8)
    output, lse, form = block_attention(*inputs, mask, SCALE, with_lse, allow_full=True)
    assert form == "full"
    seen = ~hidden(53, 2)[:, None, None]
    torch.testing.assert_close(output, attention(*inputs, seen, SCALE))
    if with_lse:
        everything = SparseBlocks.everything(mask.query_axis, mask.key_axis).hide_keys(hidden(53, 2))
        torch.testing.assert_close(lse, reference.block_attention(*inputs, everything, SCALE)[1])


@pytest.mark.parametrize(
    ("size", "density", "blocks", "form"),
    [
        (128, 0.2, 32, "gather"),
        (128, 0.9, 32, "masked"),
        (16, 0.2, 32, "masked"),
        (128, 0.1, 7, "masked"),
        (4, 0.1, 64, "masked"),
    ],
)
def test_blocks_that_are_dense_or_few_or_small_are_not_skipped(
    size: int, density: float, blocks: int, form: str
) -> None:
    axis = BlockAxis((size * blocks,), size)
    mask = SparseBlocks(torch.ones(1, 1, blocks, blocks, dtype=torch.bool), axis, axis, share=density)
    query = torch.zeros(1, 1, axis.tokens, 8)
    assert blocks_dispatch.choose(query, mask, False) == form
    assert blocks_dispatch.choose(query, mask, True) == ("gather" if form == "gather" else "full")


@pytest.mark.parametrize(
    ("share", "keys", "form"),
    [(0.3, 32768, "triton"), (None, 32768, "triton"), (0.8, 32768, "full"), (0.3, 8192, "full")],
)
def test_on_a_gpu_full_attention_runs_where_skipping_does_not_pay(
    share: float | None, keys: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_dispatch, "triton_runs", lambda query, value: True)
    axis = BlockAxis((keys,), 128)
    visited = torch.ones(1, 1, axis.blocks, axis.blocks, dtype=torch.bool, device="meta")  # as a GPU: cannot be read
    mask = SparseBlocks(visited, axis, axis, share=share)
    assert blocks_dispatch.choose(torch.zeros(1), mask, True) == form
    assert blocks_dispatch.choose(torch.zeros(1), mask, False) == "triton"


@pytest.mark.parametrize("form", [None, "gather", "masked"])
def test_blocks_below_the_kernels_tiles(form: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    axis = BlockAxis((7, 30), 4)
    visited = torch.rand(1, 2, axis.blocks, axis.blocks, generator=torch.Generator().manual_seed(0)) < 0.4
    mask, inputs = SparseBlocks(visited, axis, axis), tensors(1, 2, 37, 37, 8)
    result = block_attention(*inputs, mask, SCALE, form=form)
    torch.testing.assert_close(result.output, reference.block_attention(*inputs, mask, SCALE)[0])
    assert result.form == (form or "masked")
    monkeypatch.setattr(blocks_dispatch, "triton_runs", lambda query, value: True)
    assert blocks_dispatch.choose(inputs[0], mask, False) == "masked"
    assert blocks_dispatch.choose(inputs[0], mask, True) == "full"
    with pytest.raises(ValueError, match="takes blocks of 16 tokens or more, these have 4"):
        block_attention(*inputs, mask, SCALE, form="triton")


def test_under_autocast_the_widths_may_differ() -> None:
    query, key, value = tensors(1, 2, 70, 53, 8)
    wanted, _ = reference.block_attention(query, key, value, MASKS["random"], SCALE)
    for form in ("gather", "masked"):
        for with_lse in (False, True):
            leaf = query.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                result = block_attention(leaf, key, value.bfloat16(), MASKS["random"], SCALE, with_lse, form=form)
                result.output.float().sum().backward()
            assert result.output.dtype == torch.bfloat16
            torch.testing.assert_close(result.output.float(), wanted, atol=0.03, rtol=0.03)
            assert leaf.grad is not None


def test_forms_that_cannot_run_here_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, mask = tensors(1, 1, 70, 53, 8), MASKS["random"]
    with pytest.raises(ValueError, match="choose one of reference, triton, flex, gather, int8, masked, full"):
        block_attention(*inputs, mask, SCALE, form="fast")
    with pytest.raises(ValueError, match="one element type"):
        block_attention(inputs[0].half(), *inputs[1:], mask, SCALE)
    monkeypatch.setattr("attnctrl.kernels.blocks_dispatch.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        block_attention(*inputs, mask, SCALE, form="triton")


def seconds(run: Callable[[], object]) -> float:
    """Processor time of one call, so that other programs on the machine count little."""
    start = time.process_time()
    run()
    return time.process_time() - start


@pytest.mark.slow
@pytest.mark.parametrize("block", [64, 128])
def test_a_fifth_of_the_blocks_costs_less_than_dense_attention(block: int) -> None:
    tokens, head_dim = 4096, 64
    axis = BlockAxis((tokens,), block)
    query, key, value = tensors(1, 2, tokens, tokens, head_dim)
    scores = torch.rand(1, 2, axis.blocks, axis.blocks, generator=torch.Generator().manual_seed(0))
    mask = SparseBlocks(top_blocks(scores, 0.2), axis, axis, share=0.2)
    scale = head_dim**-0.5
    sparse, dense = [], []
    for _ in range(5):  # in turn, so that both meet the same machine
        sparse.append(seconds(lambda: block_attention(query, key, value, mask, scale)))
        dense.append(seconds(lambda: F.scaled_dot_product_attention(query, key, value, scale=scale)))
    ratio = min(sparse) / min(dense)
    print(f"{tokens} tokens, blocks of {block}, density 0.2: {ratio:.2f} of dense attention's time")
    assert block_attention(query, key, value, mask, scale).form == "gather"
    assert ratio < 1
