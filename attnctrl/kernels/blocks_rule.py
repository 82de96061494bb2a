"""Sparse blocks from a rule on tokens: blocks are found full, partial or absent, and recurring patterns kept once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from attnctrl.kernels.blocks import SparseBlocks
from attnctrl.kernels.blocks_axis import BlockAxis

Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(batch, head, query, key) -> bool: whether the query sees the key; int64 indices that broadcast, all elementwise.

FlexAttention's `mask_mod` has the same signature."""

PAIRS = 2**24
"""(query, key) pairs that a rule is asked about at a time."""


def blocks_from_rule(
    rule: Rule,
    query_axis: BlockAxis,
    key_axis: BlockAxis,
    device: torch.device | str = "cpu",
    candidates: torch.Tensor | None = None,
) -> SparseBlocks:
    """The mask that allows what `rule` allows.

    candidates: bool (batch or 1, heads or 1, query blocks, key blocks), the blocks to look into, the others being
    absent; by default all, for one sample and head. The rule is asked about every pair of the candidates, so that this
    is for masks made once: it reads values, on a GPU waits for them, and costs as much as one attention, or more.
    """
    if candidates is None:
        candidates = torch.ones(1, 1, query_axis.blocks, key_axis.blocks, dtype=torch.bool, device=device)
    visited = torch.zeros_like(candidates)
    pattern = torch.zeros(candidates.shape, dtype=torch.int32, device=candidates.device)
    tile = (query_axis.size, key_axis.size)
    known: dict[bytes, int] = {np.packbits(np.ones(tile, dtype=bool)).tobytes(): 0}
    for places in candidates.nonzero().split(max(1, PAIRS // (tile[0] * tile[1]))):
        allowed, exists = _ask(rule, query_axis, key_axis, places)
        seen = (allowed & exists).flatten(1).any(dim=-1)
        at = places[seen].unbind(dim=-1)
        # Slots without a token are allowed here: the kernels know them, so that a short block alone makes no pattern.
        packed = np.packbits((allowed | ~exists)[seen].flatten(1).cpu().numpy(), axis=-1)
        numbers = [known.setdefault(row.tobytes(), len(known)) for row in packed]
        visited[at] = True
        pattern[at] = torch.tensor(numbers, dtype=torch.int32, device=candidates.device)
    if len(known) == 1:
        return SparseBlocks(visited, query_axis, key_axis)
    bits = np.unpackbits(np.stack([np.frombuffer(row, dtype=np.uint8) for row in known]), axis=-1)
    patterns = torch.from_numpy(bits.astype(bool)).view(len(known), *tile).to(candidates.device)
    return SparseBlocks(visited, query_axis, key_axis, pattern=pattern, patterns=patterns)


def restricted(mask: SparseBlocks, rule: Rule, batch: int = 1, heads: int = 1) -> SparseBlocks:
    """The mask that allows what both `mask` and `rule` allow; batch, heads: for how many the rule differs.

    Costs as much as `blocks_from_rule` with the visited blocks as candidates.
    """
    batch, heads = max(batch, mask.visited.shape[0]), max(heads, mask.visited.shape[1])
    candidates = mask.visited.expand(batch, heads, -1, -1)
    (row, in_row), (column, in_column) = (axis.block_of_token(mask.device) for axis in (mask.query_axis, mask.key_axis))

    def both(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        allowed = rule(b, h, q, k)
        if mask.pattern is None or mask.patterns is None:
            return allowed
        number = mask.pattern.expand(candidates.shape)[b, h, row[q], column[k]].long()
        return allowed & mask.patterns[number, in_row[q], in_column[k]]

    found = blocks_from_rule(both, mask.query_axis, mask.key_axis, candidates=candidates)
    return replace(found, hidden=mask.hidden)


def _ask(
    rule: Rule, query_axis: BlockAxis, key_axis: BlockAxis, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(allowed, exists), bool (places, query block size, key block size), for (batch, head, row, column) of blocks."""
    batch, head, row, column = (one[:, None, None] for one in places.unbind(dim=-1))
    query, has_query = (slots[row[:, 0, 0]][:, :, None] for slots in query_axis.slots(places.device))
    key, has_key = (slots[column[:, 0, 0]][:, None, :] for slots in key_axis.slots(places.device))
    exists = has_query & has_key
    return rule(batch, head, query, key).expand(exists.shape), exists
