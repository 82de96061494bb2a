"""An additive mask of low rank: further channels of query and key, so that no array is queries x keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnctrl.kernels.groups import TokenGroups


@dataclass(frozen=True, eq=False)
class LowRankBias:
    """What is added to the logits, query @ key^T, beside what may be seen at all.

    query: float (batch or 1, queries, rank); key: float (batch or 1, keys, rank). groups: which keys each query sees,
    None for all. In half precision a bias is exact to its element type; it is best to have ones on the key's side.

    Raises:
        ValueError: the two sides do not fit together.
    """

    query: torch.Tensor
    key: torch.Tensor
    groups: TokenGroups | None = None

    def __post_init__(self) -> None:
        batches = {self.query.shape[0], self.key.shape[0]} - {1}
        if self.query.dim() != 3 or self.key.dim() != 3 or self.query.shape[2] != self.key.shape[2] or len(batches) > 1:
            raise ValueError(
                "The sides of a bias are (batch or 1, tokens, rank) of one rank: got "
                f"{tuple(self.query.shape)} and {tuple(self.key.shape)}."
            )

    def added(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """query and key, (batch, heads, tokens, head_dim + rank) each: their logits at `scale` hold the bias."""
        return _beside(query, self.query), _beside(key, self.key / scale)

    def dense(self) -> torch.Tensor:
        """The bias alone as float (batch or 1, 1, queries, keys), for the reference path."""
        return (self.query @ self.key.transpose(1, 2))[:, None]


def _beside(tokens: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    return torch.cat([tokens, channels[:, None].expand(*tokens.shape[:3], -1).to(tokens.dtype)], dim=-1)
