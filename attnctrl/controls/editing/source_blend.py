"""Blending with the source: outside a mask the latents of an edit are those of its source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control
from attnctrl.controls.editing.sources import Sources
from attnctrl.regions import Region
from attnctrl.sampling import Sampling
from attnctrl.sites import Step


@dataclass
class State:
    """inside: bool (height, width) of the latents, made at the first step."""

    sources: Sources
    region: Region
    inside: torch.Tensor | None = None


@dataclass(frozen=True)
class SourceBlend(Control):
    """Background blending, as in Blended Latent Diffusion (arXiv 2206.02779), Prompt-to-Prompt and ALE-Edit.

    The run draws the source and its edits together: prompt=[source, edit, ...]. After every step in the window the
    latents outside `area`, a mask of any kind that `Region` takes, become the source's. A latent is inside when any
    part of it is. Families: every one for pictures.
    """

    paper: ClassVar[str] = "arXiv 2206.02779"
    fixes: ClassVar[str] = "edits that change the rest of the picture"

    area: Any = field(default=None, compare=False)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.area is None

    def begin(self, sampling: Sampling) -> State:
        region = Region("the edit", mask=self.area)
        region.check_aspect(*sampling.latent_grid[1:])
        return State(Sources.of(sampling, self.name), region)

    def latents(self, latents: torch.Tensor, step: Step, state: State) -> torch.Tensor:
        if state.inside is None:
            height, width = latents.shape[-2:]
            state.inside = state.region.raster(height, width, "any").bool().to(latents.device)
        return torch.where(state.inside, latents, state.sources.of_source(latents))
