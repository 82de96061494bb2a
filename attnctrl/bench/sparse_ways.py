"""Every sparse method at a density that is asked for, on a small video model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from attnctrl.control import Control, Window
from attnctrl.controls import (
    Draft,
    NeighborhoodTiles,
    OracleBlocks,
    Paro,
    Radial,
    RandomBlocks,
    Rettention,
    SlidingTile,
    VMoBA,
)
from attnctrl.controls.sparse.common import LATENTS
from attnctrl.controls.sparse.radial import radial_blocks
from attnctrl.errors import ControlError
from attnctrl.pipelines.paro import calibrate_paro
from attnctrl.sites import Grid

BLOCK = 4
"""Tokens per block by default: a 16th of a frame of 8x8. The papers' 128 are a 28th of a frame of 45x80."""
WINDOW = Window(0.25, 1.0)
"""When all of them act: the papers' dense first steps are between 0.24 and 0.3."""
LAYERS = replace(LATENTS, skip=1)
"""Where all of them act: Radial's paper leaves the first layer dense."""
NAMES = (
    "oracle-blocks",
    "draft",
    "paro",
    "radial",
    "neighborhood-tiles",
    "sliding-tile",
    "vmoba",
    "rettention",
    "random-blocks",
)


RADIAL = (
    {"sink": 1, "whole": 1, "floor": 1.0},
    {"sink": 1, "whole": 0, "floor": 1.0},
    {"sink": 1, "whole": 0, "floor": 0.0},
    {"sink": 0, "whole": 0, "floor": 0.0},
    {"sink": 0, "whole": -1, "floor": 0.0},
)
"""What `Radial` keeps whatever its decay, the paper's for Wan first; each visits less than the one before."""


@cache
def radial_settings(density: float, frames: int, tokens: int, block: int) -> dict[str, Any]:
    """The parameters of `Radial` with most of the paper's floors that visit at most a density, or else the fewest."""

    def share(decay: float, floors: dict[str, Any]) -> float:
        return float(radial_blocks(frames, tokens, decay, block, **floors).float().mean())

    floors = next((f for f in RADIAL if share(0.0, f) <= density), RADIAL[-1])
    low, high = 0.0, float(frames)
    if share(high, floors) <= density:
        return {"decay": high, **floors}
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle, floors) <= density else (low, middle)
    return {"decay": low, **floors}


def make(name: str, density: float, grid: Grid, pipe: Any, draw: Callable[[], Any], block: int = BLOCK) -> Control:
    """A method that visits about `density` of the blocks of the latents, in LAYERS.

    grid: of the latents. draw: calls `pipe` for PARO's calibration. Raises ControlError for unknown names.
    """
    common: dict[str, Any] = {"window": WINDOW, "where": LAYERS, "fall_back": False}
    blocks = {**common, "block": block}
    frames, tokens = grid[0], grid[1] * grid[2]
    if name == "radial":
        return Radial(**radial_settings(density, frames, tokens, block), **blocks)
    if name == "paro":
        return Paro(calibrate_paro(pipe, draw, density, block=block), **common)
    if name == "vmoba":
        # Chunks of a ninth of a frame row, of the same places in all frames, and of both: as on the papers' grids.
        area = max(1, grid[1] // 4), max(1, grid[2] // 4)
        volume = max(1, frames // 3), max(1, grid[1] // 2), max(1, grid[2] // 2)
        return VMoBA(mode="top", density=density, frames=1, area=area, volume=volume, **common)
    simple = {
        "oracle-blocks": OracleBlocks,
        "draft": Draft,
        "neighborhood-tiles": NeighborhoodTiles,
        "sliding-tile": SlidingTile,
        "random-blocks": RandomBlocks,
        "rettention": Rettention,
    }
    if name not in simple:
        raise ControlError(f'"{name}" is no sparse method with a density: choose one of {", ".join(NAMES)}.')
    return simple[name](density=density, **blocks)
