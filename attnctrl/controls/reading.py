"""What controls read of a call in their inputs point, and its mean over layers and steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from attnctrl.kernels import probabilities
from attnctrl.sites import Call, Grid, Site
from attnctrl.stepmaps import SelfMap


def text_shares(call: Call) -> torch.Tensor:
    """What each latent token sees of the text, mean over heads: (batch, latent tokens, text tokens), summing to 1.

    Of joint attention these are shares of the attention to the text. Masks of controls are not in it.
    """
    query, key = call.query[:, :, call.queries.latent], call.key[:, :, call.keys.text]
    mask = call.mask if call.mask is None else call.mask[..., call.keys.text]
    mask = mask if mask is None or mask.shape[-2] == 1 else mask[..., call.queries.latent, :]
    heads = query.shape[1]
    # One head at a time: long texts make large maps.
    total = torch.zeros(len(query), query.shape[2], key.shape[2], device=query.device)
    for h in range(heads):
        own = mask if mask is None or mask.shape[1] == 1 else mask[:, h : h + 1]
        total += probabilities(query[:, h : h + 1], key[:, h : h + 1], own, call.scale)[:, 0]
    return total / heads


def own_map(call: Call) -> SelfMap:
    """What the latents see of each other, in joint attention as if there were no text."""
    grid = call.queries.grid
    assert grid is not None
    # A mask of joint attention speaks of the text's padding.
    mask = call.mask if call.site.kind == "self" else None
    query, key = call.query[:, :, call.queries.latent], call.key[:, :, call.keys.latent]
    return SelfMap(call.site, grid, query, key, mask, call.scale)


def before(site: Site, others: Sequence[Site]) -> Site | None:
    """The self-attention that `site` follows on its grid; a joint layer is its own."""
    if site.kind == "joint":
        return site
    found = [s for s in others if (s.expert, s.depth) == (site.expert, site.depth) and s.order < site.order]
    return max(found, key=lambda s: s.order, default=None)


def carried(maps: torch.Tensor, own: SelfMap | None, times: int) -> torch.Tensor:
    """S^times m: each latent takes the mean of the map over what it looks at, so often; `own` is S, None for identity.

    maps: (batch, maps, latent tokens) -> the same shape.
    """
    if own is None or times == 0:
        return maps
    columns = maps.transpose(1, 2)
    for _ in range(times):
        columns = own.apply(columns)
    return columns.transpose(1, 2)


@dataclass
class MeanMaps:
    """The mean of maps over layers and steps, apart for each grid; a layer that is called again in a step counts once.

    sums: by grid, (batch, maps, latent tokens). No map of a single step is kept beyond it.
    """

    sums: dict[Grid, torch.Tensor] = field(default_factory=dict)
    counts: dict[Grid, int] = field(default_factory=dict)
    step: int = -1
    now: dict[str, tuple[Grid, torch.Tensor]] = field(default_factory=dict)

    def add(self, step: int, site: str, grid: Grid, maps: torch.Tensor) -> None:
        """maps: (batch, maps, latent tokens) of one layer in one step."""
        if step != self.step:
            self._fold()
            self.step = step
        self.now[site] = grid, maps.detach().float()

    def means(self) -> dict[Grid, torch.Tensor]:
        """By grid, finest first, (batch, maps, height, width); empty when nothing was read."""
        self._fold()
        order = sorted(self.sums, key=lambda g: -g[1] * g[2])
        return {g: (self.sums[g] / self.counts[g]).unflatten(-1, g[1:]) for g in order}

    def _fold(self) -> None:
        for grid, maps in self.now.values():
            self.sums[grid] = maps if grid not in self.sums else self.sums[grid] + maps
            self.counts[grid] = self.counts.get(grid, 0) + 1
        self.now = {}


def enlarged(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(batch, maps, rows, columns) at another size, bilinear: a cell's centre stays at the same part of the picture."""
    return F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
