"""Masks and tensors that several kernel tests share."""

from __future__ import annotations

import torch

from attnctrl.kernels import TokenGroups


def random_groups(
    queries: int, keys: int, groups: int = 3, density: float = 0.3, batch: tuple[int, int] = (1, 1), seed: int = 0
) -> TokenGroups:
    """Each token is in each group with probability `density`; batch: of the queries' bits and of the keys'."""
    generator = torch.Generator().manual_seed(seed)
    sides = ((batch[0], queries, groups), (batch[1], keys, groups))
    return TokenGroups.from_members(*(torch.rand(side, generator=generator) < density for side in sides))


def tensors(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[torch.Tensor]:
    """query, key and value, (batch, heads, tokens, head_dim)."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, heads, tokens, head_dim, generator=generator).to(device, dtype)
        for tokens in (queries, keys, keys)
    ]


def zero_where_blind(lse: torch.Tensor) -> torch.Tensor:
    """The log-sum-exp with 0 for -inf: something to sum and to differentiate."""
    return lse.masked_fill(lse == float("-inf"), 0.0)
