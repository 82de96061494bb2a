"""Which tiles of queries x keys a mask leaves to visit, as the lists that the kernels walk.

A list is `row_start / row_count / col_idx`: row r visits the tiles col_idx[row_start[r] : row_start[r] + row_count[r]].
There are two per row: *full* tiles, in which every query sees every key, need no look at the bits; *partial* ones do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnctrl.kernels.groups import TokenGroups


@dataclass(frozen=True)
class TileList:
    """Both lists of every row, in ascending order of tiles; int32, (batch or 1, rows) but for col_idx, which is flat.

    Made on the device without waiting for it, so every row has room for all tiles: 4 bytes per tile, once per mask.
    """

    col_idx: torch.Tensor
    full_start: torch.Tensor
    full_count: torch.Tensor
    partial_start: torch.Tensor
    partial_count: torch.Tensor

    @property
    def rows(self) -> int:
        return self.full_start.shape[1]

    @property
    def batch_stride(self) -> int:
        """Rows from one sample to the next; 0 where samples share the list."""
        return self.rows if self.full_start.shape[0] > 1 else 0


def tile_list(groups: TokenGroups, query_tile: int, key_tile: int, by_keys: bool = False) -> TileList:
    """The tiles to visit: rows are tiles of queries or, `by_keys`, tiles of keys. Tile sizes are powers of two."""
    name = ("tiles", query_tile, key_tile, by_keys)
    if name not in groups.memo:
        visited, full = tile_maps(groups, query_tile, key_tile)
        if by_keys:
            visited, full = visited.transpose(1, 2), full.transpose(1, 2)
        groups.memo[name] = _list(visited, full)
    found: TileList = groups.memo[name]
    return found


def tile_maps(groups: TokenGroups, query_tile: int, key_tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(visited, full), each bool (batch or 1, query tiles, key tiles).

    visited: some query of the tile may share a group with some key. full: one group holds all its queries and all
    its keys; a tile that is full through several groups in turn counts as partial, which costs time, not exactness.
    A tile that ends beyond the last token is never full, because tokens that are not there have no bits.
    """
    some_query, some_key = tile_bits(groups.query_bits, query_tile), tile_bits(groups.key_bits, key_tile)
    all_query = tile_bits(groups.query_bits, query_tile, common=True)
    all_key = tile_bits(groups.key_bits, key_tile, common=True)
    visited = (some_query[:, :, None] & some_key[:, None, :]) != 0
    full = (all_query[:, :, None] & all_key[:, None, :]) != 0
    return visited, full


def tile_bits(bits: torch.Tensor, tile: int, common: bool = False) -> torch.Tensor:
    """The groups that any (or, `common`, every) token of a tile has: int64 (batch, tiles)."""
    tiles = -(-bits.shape[1] // tile)
    padded = bits.new_zeros(bits.shape[0], tiles * tile)
    padded[:, : bits.shape[1]] = bits
    folded = padded.view(bits.shape[0], tiles, tile)
    while folded.shape[-1] > 1:  # by halves: torch has no such reduction, and one launch per token would be slow
        first, second = folded.chunk(2, dim=-1)
        folded = first & second if common else first | second
    return folded[..., 0]


def _list(visited: torch.Tensor, full: torch.Tensor) -> TileList:
    batch, rows, columns = visited.shape
    # Full tiles first, then partial ones, then those to skip; a stable sort keeps each kind in ascending order, so
    # that neighbouring rows read the same keys at about the same time.
    kind = 2 - visited.int() - full.int()
    col_idx = kind.argsort(dim=-1, stable=True).int()
    full_count = full.sum(dim=-1, dtype=torch.int32)
    partial_count = visited.sum(dim=-1, dtype=torch.int32) - full_count
    full_start = torch.arange(batch * rows, dtype=torch.int32, device=visited.device).view(batch, rows) * columns
    return TileList(col_idx.flatten(), full_start, full_count, full_start + full_count, partial_count)
