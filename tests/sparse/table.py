"""The sparse methods as the shared tests take them: able to skip at the size of the tests, and at full density."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

import attnctrl as ac
from attnctrl.controls.sparse.paro_plan import ParoPlan, SitePlan, packed
from attnctrl.controls.sparse.plan import FULL, Choice, Pattern, SparsePlan
from attnctrl.sites import Grid, Site
from tests.sparse.calls import GRID, SITES

SMALL: dict[str, Any] = {"window": ac.Window(), "where": ac.Where(kinds=("self", "joint")), "fall_back": False}


@cache
def plan(grid: Grid = GRID, sites: tuple[Site, ...] = SITES, heads: int = 2, full: bool = False) -> ParoPlan:
    """A plan of all orders, whose masks keep the diagonal and every third block beside it, or all."""
    blocks = -(-grid[0] * grid[1] * grid[2] // 16)
    row = torch.arange(blocks)
    kept = ((row[:, None] - row) % 3 == 0) | full
    made = {}
    for site in sites:
        order = (torch.arange(heads) + site.order) % 6
        made[site.name] = SitePlan(grid, order, {0: packed(kept.expand(heads, -1, -1))})
    return ParoPlan(16, float(kept.float().mean()), 4, made)


def by_head(grid: Grid, sites: tuple[Site, ...], heads: int, density: float) -> SparsePlan:
    """A plan by which every other head is drafted and the rest is full."""
    drafted = Pattern("draft", (("density", density), ("block", 16)))
    choices = tuple(Choice(head % 2, 0.0, 1.0, 1.0) for head in range(heads))
    return SparsePlan(grid, 1, (Pattern(FULL), drafted), {site.name: (choices,) for site in sites})


def sparse_controls(grid: Grid = GRID, sites: tuple[Site, ...] = SITES, heads: int = 2) -> dict[str, ac.Control]:
    """Every method of blocks and chunks, with blocks of 16 tokens, at a low density."""
    return {
        "radial": ac.Radial(decay=0.1, block=16, **SMALL),
        "neighborhood-tiles": ac.NeighborhoodTiles(density=0.1, block=16, **SMALL),
        "neighborhood-tiles, sliding": ac.NeighborhoodTiles(extent=(3, 4, 5), stride=(1, 1, 1), block=16, **SMALL),
        "sliding-tile": ac.SlidingTile(density=0.1, block=16, sink=1, **SMALL),
        "draft": ac.Draft(density=0.2, block=16, **SMALL),
        "draft, mass": ac.Draft(mass=0.3, scope="row", block=16, **SMALL),
        "paro": ac.Paro(plan(grid, sites, heads), **SMALL),
        "planned": ac.Planned(by_head(grid, sites, heads, 0.2), **SMALL),
        "rettention": ac.Rettention(density=0.2, block=16, **SMALL),
        "vmoba": ac.VMoBA(mode="top", density=0.2, frames=1, volume=(2, 3, 4), **SMALL),
        "vmoba, threshold": ac.VMoBA(threshold=0.1, frames=1, area=(2, 2), **SMALL),
        "random-blocks": ac.RandomBlocks(density=0.2, block=16, **SMALL),
        "oracle-blocks": ac.OracleBlocks(density=0.2, block=16, **SMALL),
    }


def full_controls(grid: Grid = GRID, sites: tuple[Site, ...] = SITES, heads: int = 2) -> dict[str, ac.Control]:
    """The same at full density."""
    return {
        "radial": ac.Radial(decay=1000.0, block=16, **SMALL),
        "neighborhood-tiles": ac.NeighborhoodTiles(extent=grid, stride=grid, block=16, **SMALL),
        "sliding-tile": ac.SlidingTile(density=1.0, block=16, **SMALL),
        "draft": ac.Draft(density=1.0, block=16, **SMALL),
        "paro": ac.Paro(plan(grid, sites, heads, full=True), **SMALL),
        "planned": ac.Planned(by_head(grid, sites, heads, 1.0), **SMALL),
        "rettention": ac.Rettention(density=1.0, block=16, **SMALL),
        "vmoba": ac.VMoBA(mode="top", density=1.0, **SMALL),
        "vmoba, threshold": ac.VMoBA(threshold=1.0, **SMALL),
        "random-blocks": ac.RandomBlocks(density=1.0, block=16, **SMALL),
        "oracle-blocks": ac.OracleBlocks(density=1.0, block=16, **SMALL),
        "oracle-blocks, mass": ac.OracleBlocks(mass=1.0, block=16, **SMALL),
    }
