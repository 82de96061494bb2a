"""The lists that block-sparse kernels walk, in the form `row_start / row_count / col_idx`, made on the device.

Row r visits the blocks col_idx[row_start[r] : row_start[r] + row_count[r]]. There are two lists per row: *full* blocks
need no mask at all; in *partial* ones a token may be missing (a short block), hidden, or excluded by a pattern.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnctrl.kernels.blocks import SparseBlocks
from attnctrl.kernels.blocks_axis import BlockAxis


@dataclass(frozen=True)
class BlockLists:
    """Both lists of every row, in ascending order of blocks.

    full_start, partial_start: int64 (batch or 1, heads or 1, rows), places in col_idx; full_count, partial_count:
    int32, the same shape. col_idx: int32, flat; pattern_idx: the pattern inside each block of col_idx, or None.
    A row's partial blocks follow its full ones. Made without waiting for the device, so each row has room for every
    block.
    """

    col_idx: torch.Tensor
    full_start: torch.Tensor
    full_count: torch.Tensor
    partial_start: torch.Tensor
    partial_count: torch.Tensor
    pattern_idx: torch.Tensor | None

    @property
    def rows(self) -> int:
        return self.full_start.shape[2]

    @property
    def strides(self) -> tuple[int, int]:
        """Rows from one sample to the next, and from one head to the next; 0 where they share the lists."""
        batch, heads, rows = self.full_start.shape
        return (heads * rows if batch > 1 else 0), (rows if heads > 1 else 0)


def block_lists(mask: SparseBlocks, by_keys: bool = False) -> BlockLists:
    """The lists of a mask: rows are blocks of queries or, `by_keys`, blocks of keys. Kept with the mask."""
    name = ("lists", by_keys)
    if name not in mask.memo:
        visited, full = block_maps(mask, mask.query_axis if by_keys else mask.key_axis, by_keys)
        pattern = mask.pattern
        if by_keys:
            visited, full = visited.transpose(2, 3), full.transpose(2, 3)
            pattern = None if pattern is None else pattern.transpose(2, 3)
        mask.memo[name] = _lists(visited, full, pattern)
    found: BlockLists = mask.memo[name]
    return found


def block_maps(mask: SparseBlocks, walked: BlockAxis, by_keys: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(visited, full), bool (batch or 1, heads or 1, query blocks, key blocks), for a kernel that walks along an axis.

    visited: without the blocks whose keys are hidden in every sample. full: no pattern, no hidden key in any sample,
    and no slot without a token along the axis that is walked; the kernels mask the other one always.
    """
    visited = mask.visited
    whole = walked.bounds(mask.device)[1] == walked.size
    full = visited & (whole[:, None] if by_keys else whole)
    if mask.pattern is not None:
        full = full & (mask.pattern == 0)
    if mask.hidden is not None:
        token, exists = mask.key_axis.slots(mask.device)
        seen = ~mask.hidden[:, token]  # (batch or 1, blocks, size)
        visited = visited & (seen & exists).any(dim=-1).any(dim=0)
        full = full & (seen | ~exists).all(dim=-1).all(dim=0)
    return visited, full


def _lists(visited: torch.Tensor, full: torch.Tensor, pattern: torch.Tensor | None) -> BlockLists:
    batch, heads, rows, columns = visited.shape
    full = full & visited
    col_idx = ordered(visited, full)
    full_count = full.sum(dim=-1, dtype=torch.int32)
    partial_count = visited.sum(dim=-1, dtype=torch.int32) - full_count
    starts = torch.arange(batch * heads * rows, device=visited.device).view(batch, heads, rows) * columns
    pattern_idx = None if pattern is None else pattern.gather(-1, col_idx.long()).flatten()
    return BlockLists(col_idx.flatten(), starts, full_count, starts + full_count, partial_count, pattern_idx)


def ordered(visited: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """All blocks of each row, int32 like visited: the full ones, then the other visited ones, then the rest.

    Each kind ascends, so that neighbouring rows read the same keys at about the same time. By counting, not sorting.
    """
    columns = visited.shape[-1]
    place = torch.empty(visited.shape, dtype=torch.int64, device=visited.device)
    before = place.new_zeros(1)
    for chosen in (full, visited & ~full, ~visited):
        count = chosen.cumsum(dim=-1)
        place = torch.where(chosen, before + count - 1, place)
        before = before + count[..., -1:]
    blocks = torch.arange(columns, dtype=torch.int32, device=visited.device).expand(visited.shape)
    return torch.empty_like(blocks, memory_format=torch.contiguous_format).scatter_(-1, place, blocks)
