"""Attention under token groups for backends without masks (flash, sage, ...): one plain attention per kind of query.

Queries with the same bits see the same keys, and every query has one kind: so each kind attends, unmasked, to the keys
that it sees, and its rows of the output are final. Merging by log-sum-exp, which a split by *keys* would need, has
nothing left to do, and the result is exact. It costs one call, and one copy of the visible keys, per kind: there are
few kinds where groups are regions, at worst one per query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnctrl.kernels import chunked
from attnctrl.kernels.groups import TokenGroups
from attnctrl.kernels.groups_reference import check
from attnctrl.kernels.reference import attention

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor | None]]
"""(query, key, value, scale) -> (output, lse or None): an attention without a mask."""


@dataclass(frozen=True)
class Kind:
    """Queries that see the same keys, both as indices: int64 (some queries,), (some keys,), perhaps no keys."""

    queries: torch.Tensor
    keys: torch.Tensor


def group_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: TokenGroups,
    scale: float,
    return_lse: bool = False,
    attend: Attend | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `groups_reference.group_attention` computes, by calls of an attention that knows no masks.

    attend: that attention; PyTorch's fused one by default, or, for the log-sum-exp, the chunked one. The first call
    with a mask reads its bits, and on a GPU waits for them; later ones find the kinds in its memo.
    """
    check(query, key, value, groups, scale)
    attend = attend or (_with_lse if return_lse else _fused)
    samples = kinds(groups)
    outputs, sums = [], []
    for number, found in enumerate(samples):
        rows = slice(None) if len(samples) == 1 else slice(number, number + 1)
        output, lse = _attend_kinds(query[rows], key[rows], value[rows], found, scale, return_lse, attend)
        outputs.append(output)
        sums.append(lse)
    return torch.cat(outputs), torch.cat([lse for lse in sums if lse is not None]) if return_lse else None


def kinds(groups: TokenGroups) -> list[list[Kind]]:
    """The kinds of queries of each sample; one list where all samples share it."""
    if "kinds" not in groups.memo:
        sides = (bits.expand(groups.batch, -1) for bits in (groups.query_bits, groups.key_bits))
        groups.memo["kinds"] = [_kinds(queries, keys) for queries, keys in zip(*sides, strict=True)]
    found: list[list[Kind]] = groups.memo["kinds"]
    return found


def _kinds(queries: torch.Tensor, keys: torch.Tensor) -> list[Kind]:
    """The kinds of one sample with bits (queries,) and (keys,)."""
    return [Kind((queries == bits).nonzero().flatten(), (keys & bits).nonzero().flatten()) for bits in queries.unique()]


def _attend_kinds(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    found: list[Kind],
    scale: float,
    return_lse: bool,
    attend: Attend,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    outputs, sums = [], []
    for kind in found:
        queries = query.index_select(2, kind.queries)
        if len(kind.keys) == 0:
            # 0, as a sum over no keys, so that it has a gradient like the rest: 0 too.
            output = queries @ _take(key, kind.keys).transpose(-1, -2) @ _take(value, kind.keys)
            lse: torch.Tensor | None = queries.new_full(queries.shape[:3], float("-inf"), dtype=torch.float32)
        else:
            output, lse = attend(queries, _take(key, kind.keys), _take(value, kind.keys), scale)
        outputs.append(output)
        if return_lse and lse is not None:
            sums.append(lse)
    # One gather puts all rows back, where writing kind by kind would copy the output for each.
    back = torch.cat([kind.queries for kind in found]).argsort()
    lse = torch.cat(sums, dim=2).index_select(2, back) if return_lse else None
    return torch.cat(outputs, dim=2).index_select(2, back), lse


def _take(tensor: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Those tokens of (batch, heads, tokens, head_dim); itself, not a copy, where they are all."""
    return tensor if len(tokens) == tensor.shape[2] else tensor.index_select(2, tokens)


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return attention(query, key, value, None, scale), None


def _with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return chunked.attention(query, key, value, None, scale)
