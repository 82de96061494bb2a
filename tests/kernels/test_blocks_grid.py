"""Orders and windows of tokens on a grid, against hand counts and the rule of a window written out."""

from __future__ import annotations

import pytest
import torch

from attnctrl.kernels import attention
from attnctrl.kernels.blocks_dispatch import block_attention
from attnctrl.kernels.blocks_grid import axis_order, axis_windows, tile_order, window_blocks, window_maps
from attnctrl.kernels.blocks_order import TokenOrder

from .masks import tensors


def test_the_tokens_of_a_tile_follow_each_other() -> None:
    order, axis = tile_order((4, 4), (2, 2))
    assert order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert (axis.segments, axis.size) == ((4, 4, 4, 4), 16)
    frames, _ = tile_order((3, 4, 4), (1, 2, 2))
    assert torch.equal(frames.view(3, 16), order + 16 * torch.arange(3)[:, None])


def test_tiles_at_the_end_of_an_axis_are_smaller() -> None:
    order, axis = tile_order((3, 5), (2, 3))
    assert axis.segments == (6, 4, 3, 2)
    assert order.tolist() == [0, 1, 2, 5, 6, 7, 3, 4, 8, 9, 10, 11, 12, 13, 14]
    assert tile_order((4, 8, 16), (1, 8, 16))[1].size == 128


def test_axes_may_be_permuted() -> None:
    # (frames, height, width) = (2, 1, 3): the two frames of each column side by side.
    assert axis_order((2, 1, 3), (1, 2, 0)).tolist() == [0, 3, 1, 4, 2, 5]
    assert axis_order((2, 3, 4), (0, 1, 2)).tolist() == list(range(24))


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0), (2, 0, 1)])
@pytest.mark.parametrize("per_head", [False, True])
def test_an_order_is_undone(axes: tuple[int, ...], per_head: bool) -> None:
    order = axis_order((2, 3, 4), axes)
    if per_head:
        order = torch.stack((order, order.flip(0)))
    made = TokenOrder.of(order)
    tensor = torch.arange(2 * 2 * 24 * 3.0).view(2, 2, 24, 3)
    moved = made.apply(tensor)
    assert torch.equal(made.restore(moved), tensor)
    for h in range(2):
        assert torch.equal(moved[:, h], tensor[:, h, made.order[h if per_head else 0]])


def test_orders_are_differentiable_also_when_made_under_inference_mode() -> None:
    with torch.inference_mode():
        made = TokenOrder.of(torch.tensor([[2, 0, 1], [1, 2, 0]]))
    tensor = torch.zeros(1, 2, 3, 1, requires_grad=True)
    weights = torch.arange(6.0).view(1, 2, 3, 1)
    (made.apply(tensor) * weights).sum().backward()
    assert tensor.grad is not None
    assert tensor.grad.flatten().tolist() == [1.0, 2.0, 0.0, 5.0, 3.0, 4.0]


def test_the_kernel_moves_what_indexing_moves() -> None:
    pytest.importorskip("triton")
    from attnctrl.kernels.blocks_order import move as by_index
    from attnctrl.kernels.blocks_order_triton import move
    from attnctrl.kernels.groups_autograd import INTERPRETED

    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(45, generator=generator) for _ in range(2)])
    for dtype, channels in ((torch.float32, 20), (torch.bfloat16, 16)):
        # (batch, tokens, heads, channels) in memory
        tensor = torch.randn(2, 45, 2, channels, generator=generator).to(dtype).transpose(1, 2)
        for one in (order, order[:1]):
            moved = move(tensor.to(device), one.to(device))
            assert torch.equal(moved.cpu(), by_index(tensor, one))
            assert moved.stride() == tensor.stride()


def test_orders_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must be int64"):
        TokenOrder.of(torch.zeros(1, 3))
    made = TokenOrder.of(torch.tensor([[2, 0, 1], [1, 2, 0]]))
    for shape in ((1, 2, 4, 1), (1, 3, 3, 1), (2, 3, 1)):
        with pytest.raises(ValueError, match="for 3 tokens of 2 heads"):
            made.apply(torch.zeros(shape))


def test_windows_keep_their_size_at_the_ends() -> None:
    (near,) = axis_windows((8,), (4,), (1,))
    spans = [(int(row.nonzero()[0]), int(row.nonzero()[-1])) for row in near]
    assert spans == [(0, 3)] * 3 + [(1, 4), (2, 5), (3, 6)] + [(4, 7)] * 2
    (runs,) = axis_windows((8,), (4,), (4,))
    assert torch.equal(runs, torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).bool())


@pytest.mark.parametrize(
    ("grid", "window", "stride", "tile", "visited", "full"),
    [
        ((256, 256), (80, 80), (16, 16), (16, 8), 25600, 25600),
        ((256, 256), (80, 80), (1, 1), (16, 8), 34884, 17284),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), 72900, 72900),
        ((30, 48, 80), (18, 24, 24), (1, 1, 1), (2, 8, 8), 148896, 24768),
    ],
)
def test_as_many_tiles_are_visited_as_published_settings_give(
    grid: tuple, window: tuple, stride: tuple, tile: tuple, visited: int, full: int
) -> None:
    some, every = window_maps(axis_windows(grid, window, stride), tile)
    assert (int(some.sum()), int(every.sum())) == (visited, full)


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 1), (2, 4, 3)])
def test_the_mask_is_the_window_rule_in_the_order_of_tiles(stride: tuple) -> None:
    grid, window, tile = (3, 6, 5), (2, 4, 3), (2, 2, 3)
    order, mask = window_blocks(grid, tile, window, stride)
    places = torch.stack(torch.unravel_index(order, grid))
    wanted = torch.ones(90, 90, dtype=torch.bool)
    for near, place in zip(axis_windows(grid, window, stride), places, strict=True):
        wanted &= near[place[:, None], place[None, :]]
    assert torch.equal(mask.dense()[0, 0], wanted)
    assert (wanted.sum(dim=1) == 2 * 4 * 3).all()


def test_windows_as_large_as_the_grid_are_full_attention() -> None:
    order, mask = window_blocks((6, 10), (4, 4), (6, 10), (1, 1))
    assert mask.patterns is None
    inputs = tensors(1, 2, 60, 60, 8)
    made = TokenOrder.of(order)
    output = block_attention(*(made.apply(tensor) for tensor in inputs), mask, 0.3, form="gather").output
    torch.testing.assert_close(made.restore(output), attention(*inputs, None, 0.3))


def test_windows_side_by_side_are_separate_attentions() -> None:
    order, mask = window_blocks((8, 8), (4, 4), (4, 4), (4, 4))
    assert mask.patterns is None
    assert torch.equal(mask.visited[0, 0], torch.eye(4, dtype=torch.bool))
    inputs = tensors(1, 1, 64, 64, 8)
    made = TokenOrder.of(order)
    output = block_attention(*(made.apply(tensor) for tensor in inputs), mask, 0.3, form="gather").output
    apart = attention(*(made.apply(tensor).view(4, 1, 16, 8) for tensor in inputs), None, 0.3)
    torch.testing.assert_close(output, apart.view(1, 1, 64, 8))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: tile_order((4, 4), (2,)), "for each axis of the grid"),
        (lambda: tile_order((4, 4), (0, 2)), "1 or more"),
        (lambda: tile_order((64, 64), (16, 16)), "at most 128"),
        (lambda: axis_order((2, 3), (0, 2)), "a permutation"),
        (lambda: axis_windows((8,), (9,), (1,)), "at most the next"),
        (lambda: axis_windows((8,), (4,), (5,)), "at most the next"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(call: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()  # type: ignore[operator]
