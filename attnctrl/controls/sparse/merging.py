"""Merging of similar tokens, after ToMe: some tokens become the mean of those most like them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from attnctrl.sites import Grid


def destinations(grid: Grid, cell: int, generator: torch.Generator) -> torch.Tensor:
    """One random token of each cell of cell x cell tokens of a frame: int64 (cells,). Border cells may be smaller."""
    frames, height, width = grid
    places = []
    for size in (height, width):
        first = torch.arange(0, size, cell)
        places.append((first, (size - first).clamp(max=cell)))
    (rows, tall), (columns, wide) = places
    draw = torch.rand(2, frames, len(rows), len(columns), generator=generator)
    row = rows[:, None] + (draw[0] * tall[:, None]).long()
    column = columns + (draw[1] * wide).long()
    return (torch.arange(frames)[:, None, None] * height * width + row * width + column).flatten()


class Merged(NamedTuple):
    """group: int64 (batch, tokens), the kept token that each token has gone into. kept: how many there are."""

    group: torch.Tensor
    kept: int

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of each group's tokens: (batch, heads, kept, channels) of (batch, heads, tokens, channels)."""
        index = self.group[:, None, :, None].expand_as(tensor)
        sums = tensor.new_zeros(*tensor.shape[:2], self.kept, tensor.shape[3]).scatter_add(2, index, tensor)
        count = sums.new_zeros(len(self.group), self.kept).scatter_add_(1, self.group, sums.new_ones(self.group.shape))
        return sums / count[:, None, :, None]

    def spread(self, tensor: torch.Tensor) -> torch.Tensor:
        """What became of each token: (batch, heads, tokens, channels) of (batch, heads, kept, channels)."""
        index = self.group[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return tensor.gather(2, index)


def merged(features: torch.Tensor, into: torch.Tensor, count: int) -> Merged:
    """The `count` tokens that are most like one of the tokens `into` gone into it, at most all others.

    features: (batch, tokens, channels), compared by their cosine. into: int64 (destinations,).
    """
    batch, tokens, _ = features.shape
    others = torch.ones(tokens, dtype=torch.bool, device=features.device)
    others[into] = False
    source = others.nonzero().flatten()
    count = min(count, len(source))
    unit = F.normalize(features.float(), dim=-1)
    best, target = (unit[:, source] @ unit[:, into].transpose(-1, -2)).max(dim=-1)
    which = best.topk(count, dim=-1).indices
    gone = source[which]  # (batch, count)
    kept = torch.ones(batch, tokens, dtype=torch.bool, device=features.device).scatter_(1, gone, False)
    rank = kept.cumsum(dim=1) - 1
    home = rank.gather(1, into[target.gather(1, which)])
    return Merged(rank.scatter(1, gone, home), tokens - count)
