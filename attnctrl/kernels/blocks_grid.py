"""Orders and masks for tokens on a grid of frames, height and width: tiles that lie together, windows that slide."""

from __future__ import annotations

from functools import reduce
from math import prod

import torch

from attnctrl.kernels.blocks import SparseBlocks
from attnctrl.kernels.blocks_axis import BLOCK_SIZES, SMALLEST_TILE, BlockAxis

Sizes = tuple[int, ...]
"""One number per axis of a grid, the slowest first: (frames, height, width), or (height, width)."""


def tile_order(grid: Sizes, tile: Sizes, size: int | None = None) -> tuple[torch.Tensor, BlockAxis]:
    """The order in which the tokens of each tile follow each other, and the blocks that the tiles then are.

    The order is int64 (tokens,): place i takes token order[i] of the grid, which counts with the last axis fastest, as
    do tiles and the tokens inside one. Tiles at the end of an axis may be smaller; each tile is one block, of the
    smallest size from 16 on that holds it, or with `size` as many blocks of that size as it needs. tile (1, 8, 16)
    gives DraftAttention's blocks, (frames, h, w) and (t, h, w) VMoBA's 2D and 3D chunks, (6, 8, 8) with size 128 the
    tiles of Sliding Tile Attention.

    Raises:
        ValueError: other numbers of axes, sizes below 1, or, without `size`, tiles of more tokens than a block holds.
    """
    _check(grid, tile=tile)
    size = size or next((block for block in BLOCK_SIZES if block >= max(prod(tile), SMALLEST_TILE)), None)
    if size is None:
        raise ValueError(f"Tiles of {tile} are {prod(tile)} tokens: a block holds at most {BLOCK_SIZES[-1]}.")
    number = _product([torch.arange(n) // t for n, t in zip(grid, tile, strict=True)], _counts(grid, tile))
    order = number.argsort(stable=True)
    return order, BlockAxis(tuple(number.bincount().tolist()), size)


def axis_order(grid: Sizes, axes: Sizes) -> torch.Tensor:
    """The order with the grid's axes permuted, int64 (tokens,): axes names them from the slowest to the fastest.

    (1, 2, 0) of (frames, height, width) lays the frames of each place side by side: one of PAROAttention's orders.

    Raises:
        ValueError: axes that are not a permutation of the grid's.
    """
    if sorted(axes) != list(range(len(grid))):
        raise ValueError(f"axes is {axes}: it must be a permutation of {tuple(range(len(grid)))}.")
    return torch.arange(prod(grid)).view(grid).permute(axes).flatten()


def window_blocks(
    grid: Sizes, tile: Sizes, window: Sizes, stride: Sizes, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, SparseBlocks]:
    """Generalized neighborhood attention (arXiv 2504.16922) in blocks: the order of `tile_order`, and the mask in it.

    Along each axis queries go in runs of `stride`, and each run sees `window` tokens around its middle one, shifted to
    lie inside the grid: every query sees prod(window) keys. stride 1 slides; stride = window gives windows that stand
    side by side. Where tiles divide grid, stride and window suitably all visited blocks are full.

    Raises:
        ValueError: as `tile_order`; or a window larger than the grid, or a stride larger than the window.
    """
    order, axis = tile_order(grid, tile)
    maps = axis_windows(grid, window, stride)
    visited, full = window_maps(maps, tile)
    pattern, patterns = _window_patterns(maps, tile, visited & ~full, axis.size)
    if len(patterns) == 1:
        mask = SparseBlocks(visited[None, None], axis, axis)
    else:
        mask = SparseBlocks(visited[None, None], axis, axis, pattern=pattern[None, None], patterns=patterns)
    return order.to(device), mask.to(device)


def _window_patterns(
    maps: list[torch.Tensor], tile: Sizes, partial: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pattern holds inside each block, int32 (blocks, blocks), and the patterns, bool (patterns, size, size).

    What two tiles see of each other is the product of what they see along each axis, so that no token is asked.
    """
    number = torch.zeros(1, 1, dtype=torch.int64)
    parts = []
    for near, unit in zip(maps, tile, strict=True):
        pieces = [row.split(unit, dim=1) for row in near.split(unit, dim=0)]
        known: dict[tuple, int] = {}
        keys = [[(tuple(one.shape), *one.flatten().tolist()) for one in row] for row in pieces]
        here = [[known.setdefault(key, len(known)) for key in row] for row in keys]
        parts.append([torch.tensor(key[1:], dtype=torch.bool).view(key[0]) for key in known])
        own = torch.tensor(here)
        both = number[:, None, :, None] * len(known) + own[None, :, None, :]
        number = both.reshape(len(number) * len(own), -1)
    found, which = number[partial].unique(return_inverse=True)
    patterns = torch.ones(len(found) + 1, size, size, dtype=torch.bool)
    for place, one in enumerate(found.tolist(), start=1):
        inside = torch.ones(1, 1, dtype=torch.int32)
        for choices in reversed(parts):
            one, last = divmod(one, len(choices))
            inside = torch.kron(choices[last].int(), inside)
        patterns[place, : inside.shape[0], : inside.shape[1]] = inside.bool()
    pattern = torch.zeros(number.shape, dtype=torch.int32)
    pattern[partial] = which.int() + 1
    return pattern, patterns


def axis_windows(grid: Sizes, window: Sizes, stride: Sizes) -> list[torch.Tensor]:
    """For each axis, bool (queries, keys): what a query sees along it."""
    _check(grid, window=window, stride=stride)
    found = []
    for length, wide, step in zip(grid, window, stride, strict=True):
        if not step <= wide <= length:
            raise ValueError(f"stride {step}, window {wide}, axis {length}: each must be at most the next.")
        place = torch.arange(length)
        middle = torch.clamp(place // step * step + step // 2, max=length - 1)
        start = torch.clamp(middle - wide // 2, min=0, max=length - wide)[:, None]
        found.append((place >= start) & (place < start + wide))
    return found


def window_maps(maps: list[torch.Tensor], tile: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """(visited, full), bool (tiles, tiles), of the product of one map per axis: where some, or all, is seen."""
    some, every = [], []
    for near, size in zip(maps, tile, strict=True):
        tiles = -(-near.shape[0] // size)
        number = torch.arange(near.shape[0], device=near.device) // size
        member = (number == torch.arange(tiles, device=near.device)[:, None]).float()
        pairs = member.sum(dim=1)[:, None] * member.sum(dim=1)
        seen = member @ near.float() @ member.T  # whole numbers, exact in float32
        some.append(seen > 0)
        every.append(seen == pairs)
    return reduce(torch.kron, (one.int() for one in some)).bool(), reduce(torch.kron, (o.int() for o in every)).bool()


def _counts(grid: Sizes, tile: Sizes) -> Sizes:
    return tuple(-(-n // t) for n, t in zip(grid, tile, strict=True))


def _product(places: list[torch.Tensor], counts: Sizes) -> torch.Tensor:
    """The number of each token's tile, (tokens,), from its tile along each axis."""
    number = torch.zeros((), dtype=torch.int64)
    for place, count in zip(places, counts, strict=True):
        number = number[..., None] * count + place
    return number.flatten()


def _check(grid: Sizes, **others: Sizes) -> None:
    for name, sizes in {"grid": grid, **others}.items():
        if len(sizes) != len(grid) or min(sizes, default=0) < 1:
            raise ValueError(f"{name} is {sizes}: it must have a size of 1 or more for each axis of the grid {grid}.")
