"""Attention under token groups by xformers, for users who have chosen it (the extra `xformers`).

Queries of one kind see the same keys (`groups_merge`). Where no key is seen by two kinds, all kinds are one call with a
block-diagonal mask; else one call per kind. xformers' other way, a bias, would be queries x keys.
"""

from __future__ import annotations

from typing import Any

import torch

from attnctrl.kernels import groups_merge
from attnctrl.kernels.groups import TokenGroups
from attnctrl.kernels.groups_merge import Kind
from attnctrl.kernels.groups_reference import check


def group_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: TokenGroups,
    scale: float,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `groups_reference.group_attention` computes, without the log-sum-exp.

    Raises:
        ValueError: xformers is not installed, or the log-sum-exp is asked for: xformers gives none with gradients.
    """
    check(query, key, value, groups, scale)
    if return_lse:
        raise ValueError("xformers gives no log-sum-exp that can be differentiated: use another form.")
    ops = _xformers()
    samples = groups_merge.kinds(groups)
    if not all(disjoint(found, groups.keys) for found in samples):

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: float) -> tuple[torch.Tensor, None]:
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            return ops.memory_efficient_attention(q, k, v, scale=s).transpose(1, 2), None

        return groups_merge.group_attention(query, key, value, groups, scale, attend=attend)
    return _block_diagonal(ops, query, key, value, samples, scale), None


def disjoint(found: list[Kind], keys: int) -> bool:
    """Whether no key is seen by two kinds of queries."""
    total = sum(len(kind.keys) for kind in found)
    return total <= keys and len(torch.cat([kind.keys for kind in found]).unique()) == total


def _block_diagonal(
    ops: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    samples: list[list[Kind]],
    scale: float,
) -> torch.Tensor:
    """One call for all samples and kinds, laid end to end as the mask wants them: (1, tokens, heads, head_dim)."""
    batch, heads, queries, _ = query.shape
    per_sample = samples if len(samples) > 1 else samples * batch
    # (sample, kind) pairs whose queries see something; the others stay 0.
    seeing = [(n, kind) for n, found in enumerate(per_sample) for kind in found if len(kind.keys)]
    if not seeing:
        return query.new_zeros(*query.shape[:3], value.shape[3])
    rows = torch.cat([kind.queries + n * queries for n, kind in seeing])
    columns = torch.cat([kind.keys + n * key.shape[2] for n, kind in seeing])
    q, k, v = (tensor.transpose(1, 2).reshape(1, -1, heads, tensor.shape[3]) for tensor in (query, key, value))
    mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(
        [len(kind.queries) for _, kind in seeing], [len(kind.keys) for _, kind in seeing]
    )
    seen = ops.memory_efficient_attention(q[:, rows], k[:, columns], v[:, columns], attn_bias=mask, scale=scale)
    output = v.new_zeros(1, batch * queries, heads, v.shape[3]).index_copy(1, rows, seen)
    return output.view(batch, queries, heads, -1).transpose(1, 2)


def _xformers() -> Any:
    try:
        from xformers import ops
    except ImportError as error:
        raise ValueError('xformers is not installed: pip install "attnctrl[xformers]", or use another form.') from error
    return ops
