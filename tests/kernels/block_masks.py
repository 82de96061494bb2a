"""Sparse blocks that several kernel tests share."""

from __future__ import annotations

import torch

from attnctrl.kernels.blocks import SparseBlocks
from attnctrl.kernels.blocks_axis import BlockAxis
from attnctrl.kernels.blocks_rule import blocks_from_rule


def random_blocks(
    queries: int | tuple[int, ...],
    keys: int | tuple[int, ...],
    density: float = 0.5,
    planes: tuple[int, int] = (1, 1),
    size: tuple[int, int] = (16, 16),
    seed: int = 0,
) -> SparseBlocks:
    """Each block is visited with probability `density`; planes: the samples and heads that the mask tells apart."""
    sides = zip((queries, keys), size, strict=True)
    rows, columns = (BlockAxis(n if isinstance(n, tuple) else (n,), block) for n, block in sides)
    generator = torch.Generator().manual_seed(seed)
    return SparseBlocks(torch.rand(*planes, rows.blocks, columns.blocks, generator=generator) < density, rows, columns)


def band(queries: int, keys: int, reach: int, size: tuple[int, int] = (16, 16)) -> SparseBlocks:
    """Query i sees key j when |i - j| <= reach: blocks that are full, partial and absent."""
    axes = (BlockAxis((queries,), size[0]), BlockAxis((keys,), size[1]))
    return blocks_from_rule(lambda b, h, q, k: (q - k).abs() <= reach, *axes)


def hidden(keys: int, samples: int = 1) -> torch.Tensor:
    """bool (samples, keys): the last third is hidden, of later samples a little more, and one early key."""
    found = torch.arange(keys)[None] >= torch.tensor([2 * keys // 3 - 3 * n for n in range(samples)])[:, None]
    found[:, 2] = True
    return found


MASKS = {
    "random": random_blocks(70, 53),
    "per head": random_blocks(70, 53, planes=(1, 2), seed=1),
    "per sample": random_blocks(70, 53, planes=(2, 1), seed=2),
    "per sample and head": random_blocks(70, 53, planes=(2, 2), seed=3),
    "full density": random_blocks(64, 48, 1.1),
    "nothing": random_blocks(33, 33, 0.0),
    "one token": random_blocks(1, 1, 1.1),
    "band": band(70, 70, 11),
    "hidden keys": random_blocks(70, 53, 0.7).hide_keys(hidden(53)),
    "hidden per sample": random_blocks(70, 53, 0.7).hide_keys(hidden(53, 2)),
    "band, hidden per sample": band(70, 53, 20).hide_keys(hidden(53, 2)),
    "segments": random_blocks((10, 37, 5), (21, 40), 0.6, (1, 2), seed=4),
    "segments, hidden": random_blocks((10, 37), (21, 40), 0.8).hide_keys(hidden(61, 2)),
    "sizes that differ": band(70, 80, 9, (32, 16)),
}
"""For two samples of two heads: every thing that a mask can have, most of them with rows that see nothing."""
