"""VMoBA's choice of chunks by hand, its attention against a mask per query, and its partitions."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.sparse.chunks import chunk_attention, chunk_means, near_chunks, top_chunks
from attnctrl.controls.sparse.common import Sequence
from attnctrl.controls.sparse.vmoba import partition
from tests.kernels.masks import tensors
from tests.sparse.calls import GRID, SITES, a_call, attended, dense, sampling
from tests.sparse.table import SMALL

CPU = torch.device("cpu")
SIZES = (7, 12, 5, 12)
CHUNK = torch.arange(4).repeat_interleave(torch.tensor(SIZES))
OWN = torch.nn.functional.one_hot(CHUNK, 4).bool()


def seen(chosen: torch.Tensor) -> torch.Tensor:
    """The mask that a choice (batch, heads, queries, chunks) says."""
    return chosen.repeat_interleave(torch.tensor(SIZES), dim=-1)


def test_the_mean_key_of_a_chunk() -> None:
    key = torch.tensor([[1.0], [3.0], [5.0], [7.0], [9.0]])[None, None]
    means = chunk_means(key, torch.tensor([0, 0, 1, 1, 1]), 2)
    assert means.flatten().tolist() == [2.0, 7.0]


def test_the_top_chunks_by_hand() -> None:
    gate = torch.tensor([[0.0, 9.0, 5.0], [8.0, 1.0, 7.0]])[None, None]
    own = torch.tensor([[True, False, False], [False, True, False]])
    each = top_chunks(gate, own, 2, per_query=True)[0, 0]
    assert each.tolist() == [[True, True, False], [True, True, False]]
    # Four of a head's six pairs: both own ones, and the best two of the rest, 9 and 8.
    assert top_chunks(gate, own, 2, per_query=False)[0, 0].tolist() == [[True, True, False], [True, True, False]]
    gate[0, 0, 1] = torch.tensor([1.0, 0.0, 2.0])
    both = top_chunks(gate, own, 2, per_query=False)[0, 0]
    assert both.tolist() == [[True, True, True], [False, True, False]]
    assert top_chunks(gate, own, 1, per_query=True)[0, 0].tolist() == own.tolist()
    assert top_chunks(gate, own, 9, per_query=True).all()


def test_the_chunks_near_enough_by_hand() -> None:
    own = torch.tensor([[True, False, False, False]])
    # Brought to [0, 1]: 0.5, 1, 0, 0.5; the sum is 2.
    gate = torch.tensor([[3.0, 5.0, 1.0, 3.0]])[None, None]

    def at(share: float) -> list[bool]:
        return near_chunks(gate, own, share, per_query=True)[0, 0, 0].tolist()

    # Its own has 0.25 of the sum, and one more is always taken, the best.
    assert at(0.0) == at(0.25) == at(0.75) == [True, True, False, False]
    assert at(0.76) == [True, True, False, True]
    assert at(1.0) == [True, True, True, True]


def test_of_two_chunks_both_are_taken() -> None:
    """The official code's quirk: the own one may have all of the similarity, and the other is taken all the same."""
    own = torch.tensor([[True, False]])
    assert near_chunks(torch.tensor([[4.0, 1.0]])[None, None], own, 0.25, per_query=True).all()


def test_in_a_head_some_queries_get_more() -> None:
    gate = torch.tensor([[0.0, 1.0, 0.9], [0.0, 0.1, 0.0]])[None, None]
    own = torch.tensor([[True, False, False], [True, False, False]])
    found = near_chunks(gate, own, 0.9, per_query=False)[0, 0]
    # The sum is 2; 1.8 are asked for: 1 and 0.9 reach that.
    assert found.tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("hidden", [False, True])
def test_attention_to_chosen_chunks_is_that_under_the_mask(count: int, hidden: bool) -> None:
    """Outputs and gradients; with hidden keys also where they are a whole chunk."""
    inputs = [tensor.requires_grad_() for tensor in tensors(2, 2, 36, 36, 8)]
    gate = torch.randn(2, 2, 36, 4, generator=torch.Generator().manual_seed(1))
    chosen = top_chunks(gate, OWN, count, per_query=True)
    gone = torch.zeros(2, 36, dtype=torch.bool)
    if hidden:
        gone[0, 3:9] = gone[1, 20:24] = True
    output = chunk_attention(*inputs, chosen, SIZES, 0.4, gone if hidden else None)
    mask = seen(chosen) & ~gone[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.4)
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-4)
    weights = torch.linspace(-1, 1, 8)
    mine, exact = (torch.autograd.grad((one * weights).sum(), inputs) for one in (output, expected))
    for one, other in zip(mine, exact, strict=True):
        torch.testing.assert_close(one, other, atol=5e-6, rtol=1e-4)


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient() -> None:
    inputs = [tensor.requires_grad_() for tensor in tensors(1, 1, 36, 36, 8)]
    chosen = OWN[None, None].clone()
    gone = CHUNK[None] == 2
    output = chunk_attention(*inputs, chosen, SIZES, 0.4, gone)
    assert not output[:, :, CHUNK == 2].any()
    grads = torch.autograd.grad(output.sum(), inputs)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert not grads[0][:, :, CHUNK == 2].any()


def test_splitting_a_chunk_changes_nothing() -> None:
    inputs = tensors(1, 2, 36, 36, 8)
    chosen = top_chunks(torch.randn(1, 2, 36, 4, generator=torch.Generator().manual_seed(2)), OWN, 2, True)
    halves = chosen[..., [0, 1, 1, 2, 3]]
    one = chunk_attention(*inputs, chosen, SIZES, 0.4)
    torch.testing.assert_close(chunk_attention(*inputs, halves, (7, 4, 8, 5, 12), 0.4), one)


def test_partitions() -> None:
    sequence = Sequence((4, 4, 6), 3, 0)
    frames = partition(sequence, (2, 4, 6), CPU)
    assert frames.sizes == (3, 48, 48)
    assert torch.equal(frames.order.order[0], torch.arange(99))  # whole frames are in order already
    area = partition(sequence, (4, 2, 3), CPU)
    assert area.sizes == (3, 24, 24, 24, 24)
    # The first chunk: rows 0, 1 and columns 0 to 2 of every frame.
    first = [3 + f * 24 + r * 6 + c for f in range(4) for r in range(2) for c in range(3)]
    assert area.order.order[0, 3:27].tolist() == first
    tensor = torch.arange(99.0).view(1, 1, 99, 1)
    for tile in ((2, 4, 6), (4, 2, 3), (3, 3, 4), (9, 9, 9)):
        made = partition(sequence, tile, CPU)
        assert torch.equal(made.order.restore(made.order.apply(tensor)), tensor)
        assert sum(made.sizes) == 99
        assert made.latents == slice(1, len(made.sizes))


def test_the_published_chunks() -> None:
    """Wan 2.1 1.3B at 480x832: 10 chunks of 3120, 130 of 240, 325 of 96."""
    control, grid = ac.VMoBA(), (20, 30, 52)
    sizes = [partition(Sequence(grid, 0, 0), control.tile(layer, grid), CPU).sizes for layer in range(3)]
    assert [(len(one), set(one)) for one in sizes] == [(10, {3120}), (130, {240}), (325, {96})]
    assert control.tile(3, grid) == control.tile(0, grid)
    for layer in range(3):  # 720p, odd frames
        made = partition(Sequence((21, 45, 80), 0, 0), control.tile(layer, (21, 45, 80)), CPU)
        assert sum(made.sizes) == 21 * 45 * 80


@pytest.mark.parametrize("scope", ["query", "head"])
@pytest.mark.parametrize("mode", ["top", "threshold"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_control_against_its_formulas(mode: str, scope: str, layer: int) -> None:
    control = ac.VMoBA(mode=mode, scope=scope, density=0.3, threshold=0.2, frames=1, volume=(2, 3, 4), **SMALL)
    call = a_call(layer=layer, batch=2)
    output, report = attended(control, call)
    parts = partition(Sequence(GRID, 0, 0), control.tile(layer, GRID), CPU)
    back = parts.order.inverse[0]
    chunk = parts.chunk[back]
    own = torch.nn.functional.one_hot(chunk, len(parts.sizes)).bool()
    means = torch.stack([call.key[:, :, chunk == n].mean(dim=2) for n in range(len(parts.sizes))], dim=2)
    chosen = control.choose(call.query, means, own)
    mask = chosen[..., chunk]
    torch.testing.assert_close(output, dense(call, mask), atol=2e-6, rtol=1e-4)
    (visit,) = report.visits.values()
    assert visit.share == pytest.approx(float(mask.float().mean()))


def test_layers_take_turns_by_their_place_in_the_model() -> None:
    given = sampling()
    given.sites = [*reversed(SITES)]
    state = ac.VMoBA(where=ac.Where(kinds=("joint",), skip=1)).begin(given)
    assert [state.made["layer", site.name] for site in SITES] == [0, 1, 2]
