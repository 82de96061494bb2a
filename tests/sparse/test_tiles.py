"""Windows of tiles: hand counts, published densities, any grid, and every query its window."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.sparse.neighborhood_tiles import neighborhood
from attnctrl.controls.sparse.sliding_tile import tile_windows
from attnctrl.controls.sparse.tiles import SHAPES, tile_counts, tile_shape, window_sizes
from attnctrl.kernels.blocks_grid import axis_windows, tile_order
from tests.sparse.calls import a_call, attended, dense
from tests.sparse.table import SMALL


def test_sizes_by_hand() -> None:
    assert window_sizes((30, 48, 80), 0.125) == (15, 24, 40)
    assert window_sizes((1, 64, 64), 0.25) == (1, 32, 32)
    assert window_sizes((3, 3, 3), 0.001) == (1, 1, 1)
    # A fifth of 64 is 12.8, and each side 2.3 of 4: 2 x 2 x 3 is nearest.
    assert sorted(window_sizes((4, 4, 4), 0.2)) == [2, 2, 3]
    assert window_sizes((4, 4, 4), 1.0) == window_sizes((4, 4, 4), 1.0, odd=True) == (4, 4, 4)
    assert sorted(window_sizes((4, 4, 4), 0.2, odd=True)) == [1, 3, 3]  # 9 is nearer to 12.8 than 27 or 3
    assert window_sizes((5, 6, 10), 0.1, odd=True) == (3, 3, 3)
    assert tile_counts((21, 45, 80), (2, 8, 8)) == (11, 6, 10)
    for block, shape in SHAPES.items():
        assert shape[0] * shape[1] * shape[2] == block
        assert tile_shape((1, 64, 64), block)[0] == 1
    assert tile_shape((1, 6, 100), 128) == (1, 6, 16)


def test_the_published_settings() -> None:
    """NATTEN's counts: 25600 of 262144 tiles and 72900 of 810000, all of them full."""
    flux = ac.NeighborhoodTiles(extent=(1, 80, 80), stride=(1, 16, 16))
    assert flux.sizes((1, 256, 256)) == ((1, 8, 16), (1, 80, 80), (1, 16, 16))
    _, mask = neighborhood((1, 256, 256), *flux.sizes((1, 256, 256)))
    assert (int(mask.visited.sum()), mask.pattern) == (25600, None)
    video = ac.NeighborhoodTiles(extent=(18, 24, 24), stride=(16, 8, 8))
    _, mask = neighborhood((30, 48, 80), *video.sizes((30, 48, 80)))
    assert (int(mask.visited.sum()), mask.pattern) == (72900, None)


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 4, 4), (1, 3, 2)])
@pytest.mark.parametrize("sink", [0, 1])
def test_every_query_sees_its_window_and_the_sink(stride: tuple[int, int, int], sink: int) -> None:
    grid, window = (3, 6, 9), (2, 4, 5)
    order, mask = neighborhood(grid, (2, 4, 4), window, stride, sink)
    seen = mask.dense()[0, 0]
    back = order.argsort()
    seen = seen[back][:, back].view(*grid, *grid)
    near = axis_windows(grid, window, stride)
    expected = torch.einsum("ax,by,cz->abcxyz", *(one.float() for one in near)) > 0
    if not sink:
        assert torch.equal(seen, expected)
        assert (seen.flatten(3).sum(dim=-1) == 2 * 4 * 5).all()
    else:
        # Whole tiles of (2, 4, 4): the second frame lies in those of the first.
        expected[..., :2, :, :] = True
        assert torch.equal(seen, expected)


def test_a_window_of_tiles_by_hand() -> None:
    # 5 tiles, 3 seen: the window is shifted to lie inside.
    rows = [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert torch.equal(tile_windows((1, 1, 5), (1, 1, 3)), torch.tensor(rows, dtype=torch.bool))
    both = tile_windows((2, 1, 5), (1, 1, 3))
    assert torch.equal(both, torch.block_diag(*[torch.tensor(rows)] * 2).bool())


def test_the_papers_tiles_take_three_blocks_each() -> None:
    control = ac.SlidingTile(tile=(6, 8, 8), tiles=(3, 3, 3))
    assert control.sizes((30, 48, 80)) == ((6, 8, 8), (5, 6, 10), (3, 3, 3))
    order, axis = tile_order((30, 48, 80), (6, 8, 8), 128)
    assert axis.blocks == 900
    assert set(axis.segments) == {384}
    assert order[:8].tolist() == list(range(8))
    # 27 of 300 tiles: 9% of the pairs.
    assert tile_windows((5, 6, 10), (3, 3, 3)).float().mean() == pytest.approx(0.09)


def test_sliding_tiles_are_neighborhoods_of_tiles() -> None:
    """Where tiles divide the grid both say the same."""
    grid = (2, 8, 16)
    call = a_call(grid)
    one, _ = attended(ac.SlidingTile(tile=(1, 4, 4), tiles=(1, 1, 3), block=16, **SMALL), call)
    other = ac.NeighborhoodTiles(extent=(1, 4, 12), stride=(1, 4, 4), block=16, **SMALL)
    two, _ = attended(other, call)
    torch.testing.assert_close(one, two)


def test_tiles_of_several_blocks_compute_what_their_mask_says() -> None:
    grid, tile = (3, 6, 10), (2, 4, 5)  # 40 tokens: two blocks of 32
    call = a_call(grid)
    output, _ = attended(ac.SlidingTile(tile=tile, tiles=(1, 1, 2), block=32, **SMALL), call)
    place = torch.cartesian_prod(*(torch.arange(n) // t for n, t in zip(grid, tile, strict=True)))
    same = (place[:, None] == place).all(dim=-1)
    wide = (place[:, None, :2] == place[:, :2]).all(dim=-1)
    assert not torch.equal(same, wide)
    torch.testing.assert_close(output, dense(call, wide[None, None]), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("size", [(21, 45, 80), (20, 30, 52), (1, 45, 80), (33, 48, 80)])
def test_any_grid(size: tuple[int, int, int]) -> None:
    for control in (ac.NeighborhoodTiles(density=0.1), ac.SlidingTile(density=0.1)):
        tile, *_ = control.sizes(size)
        order, axis = tile_order(size, tile, 128)
        assert torch.equal(order.sort().values, torch.arange(size[0] * size[1] * size[2]))
        assert axis.tokens == len(order)
    order, mask = neighborhood(size, *ac.NeighborhoodTiles(density=0.1).sizes(size))
    assert 0.02 < mask.density() < 0.35
    assert mask.visited.any(dim=-1).all()


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ac.ControlError, match=r"NeighborhoodTiles: extent is \(0, 1, 1\): give"):
        ac.NeighborhoodTiles(extent=(0, 1, 1))
    with pytest.raises(ac.ControlError, match=r"SlidingTile: tile is \(4, 4\): give \(frames, height, width\)"):
        ac.SlidingTile(tile=(4, 4))  # type: ignore[arg-type]
