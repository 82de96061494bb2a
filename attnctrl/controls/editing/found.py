"""What methods share that find in the attention which part of a given picture an instruction is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from attnctrl.regions import Region
from attnctrl.sampling import Sampling
from attnctrl.sites import Grid, Site


def share(site: Site) -> float:
    """The tokens of a site as a share of the latents' own, where their sides are whole: of odd ones as of even."""
    return 0.25**site.depth


def on_grid(masks: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Masks (pictures, n, height, width) of the latents on a site's grid: bool (pictures, n, tokens).

    A token is inside when any part of it is.
    """
    return F.adaptive_max_pool2d(masks.float(), grid[1:]).flatten(2) > 0


def resized(maps: torch.Tensor, grid: Grid, latents: Grid) -> torch.Tensor:
    """Maps (pictures, n, tokens) of a site as (pictures, n, height, width) of the latents, bilinear."""
    frames = maps.reshape(*maps.shape[:2], *grid[1:])
    return F.interpolate(frames, size=latents[1:], mode="bilinear", align_corners=False)


def given(masks: Sequence[Any], sampling: Sampling) -> torch.Tensor:
    """Masks of any kind that `Region` takes as bool (pictures, masks, height, width) of the latents.

    Raises ControlError as `Region` does, and for masks of another aspect ratio.
    """
    _, height, width = sampling.latent_grid
    regions = [Region("the edit", mask=mask) for mask in masks]
    for region in regions:
        region.check_aspect(height, width)
    rows = torch.stack([region.raster(height, width, "any") > 0 for region in regions])
    return rows.to(sampling.device).expand(sampling.batch, -1, -1, -1)
