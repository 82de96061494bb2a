"""Regions tied to one sampling: which tokens, which pixels, for every picture of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from attnctrl.control import Where
from attnctrl.errors import ControlError
from attnctrl.regions import Region
from attnctrl.sites import Grid

if TYPE_CHECKING:
    from attnctrl.sampling import Sampling

Regions = Sequence[Region] | Sequence[Sequence[Region]]
"""One list for every prompt, or one list per prompt."""


def per_prompt(regions: Regions, prompts: int) -> list[list[Region]]:
    """One list of regions per prompt. Raises ControlError when the numbers do not match."""
    if all(isinstance(r, Region) for r in regions):
        return [list(regions)] * prompts  # type: ignore[arg-type]
    if any(isinstance(r, Region) for r in regions):
        raise ControlError("regions mix single regions and lists: give one list, or one list per prompt.")
    if len(regions) != prompts:
        raise ControlError(
            f"there are {len(regions)} lists of regions for {prompts} prompts: give one list for all, or one per "
            "prompt."
        )
    return [list(rs) for rs in regions]  # type: ignore[arg-type]


def phrases_of(regions: Regions) -> list[str]:
    """Every phrase that these regions name, in order, once each."""
    flat = [r for item in regions for r in ([item] if isinstance(item, Region) else item)]
    return list(dict.fromkeys(r.phrase for r in flat))


@dataclass
class Layout:
    """The regions of one sampling as tensors; rows are pictures in the pipeline's order.

    regions: one list per prompt. tokens: (batch, regions, tokens) bool, membership of the prompt's tokens; prompts
    with fewer regions are padded with empty rows. valid: (batch, regions) bool, False for the padding.
    """

    regions: list[list[Region]]
    tokens: torch.Tensor
    valid: torch.Tensor
    images: int
    device: torch.device
    _masks: dict[tuple[Grid, str], torch.Tensor] = field(default_factory=dict)

    def mask(self, grid: Grid, how: str = "nearest") -> torch.Tensor:
        """(batch, regions, latent tokens) float32 on `grid`, made once per grid."""
        if (grid, how) not in self._masks:
            frames, height, width = grid
            rows = torch.zeros(len(self.regions), self.valid.shape[1], frames * height * width)
            for p, regions in enumerate(self.regions):
                for r, region in enumerate(regions):
                    rows[p, r] = region.raster(height, width, how).flatten().repeat(frames)
            self._masks[grid, how] = rows.to(self.device).repeat_interleave(self.images, dim=0)
        return self._masks[grid, how]


def resolve(sampling: Sampling, regions: Regions, where: Where, *, how: str = "nearest", find: bool = True) -> Layout:
    """Tie `regions` to the prompts and grids of `sampling`, raising ControlError now rather than in some layer.

    where: the sites that the method uses; how: its raster, tried on every grid of these sites. find: False for
    methods that encode the regions on their own, whose phrases need not stand in the prompt.
    """
    lists = per_prompt(regions, sampling.prompt_count)
    most = max((len(rs) for rs in lists), default=0)
    tokens = torch.zeros(len(lists), most, sampling.text_tokens, dtype=torch.bool)
    valid = torch.zeros(len(lists), most, dtype=torch.bool)
    for p, rs in enumerate(lists):
        for r, region in enumerate(rs):
            region.check_aspect(sampling.latent_grid[1], sampling.latent_grid[2])
            valid[p, r] = True
            if find:
                tokens[p, r, list(sampling.find(region.phrase, p, region.occurrence))] = True
    layout = Layout(
        lists,
        tokens.to(sampling.device).repeat_interleave(sampling.images_per_prompt, dim=0),
        valid.to(sampling.device).repeat_interleave(sampling.images_per_prompt, dim=0),
        sampling.images_per_prompt,
        sampling.device,
    )
    for grid in sampling.grids(where):
        layout.mask(grid, how)
    return layout
