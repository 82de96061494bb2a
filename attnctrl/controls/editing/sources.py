"""The source among the pictures of a run: what every edit of two branches shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image

from attnctrl.errors import ControlError
from attnctrl.sampling import Sampling
from attnctrl.sites import Step


@dataclass(frozen=True)
class Sources:
    """Which pictures of a batch are the source and which are edits of it.

    The first prompt is the source's, the others are edits; picture i of an edit belongs to picture i of the source.
    prompts, images: how many prompts, and pictures of each.
    """

    prompts: int
    images: int

    @classmethod
    def of(cls, sampling: Sampling, who: str) -> Sources:
        """Raises ControlError where there is no edit beside the source."""
        if sampling.prompt_count < 2:
            raise ControlError(
                f"{who} needs the source and its edit in one run: call the pipeline with prompt=[source, edit], or use "
                "EditPipeline."
            )
        return cls(sampling.prompt_count, sampling.images_per_prompt)

    def of_source(self, rows: torch.Tensor) -> torch.Tensor:
        """For every picture the row of its source, (pictures, ...) from (pictures, ...)."""
        return rows[: self.images].repeat(self.prompts, *[1] * (rows.ndim - 1))

    def edits(self, rows: torch.Tensor) -> torch.Tensor:
        """True for the edits, bool (pictures, 1, ...) of the same number of axes as `rows`."""
        chosen = torch.arange(self.prompts * self.images, device=rows.device) >= self.images
        return chosen.reshape(-1, *[1] * (rows.ndim - 1))


def on_trajectory(trajectory: Any, step: Step, latents: torch.Tensor, sources: Sources, who: str) -> torch.Tensor:
    """Where a trajectory is after `step`, (pictures of the source, channels, height, width) for latents like these.

    trajectory: (steps + 1, pictures or 1, channels, height, width) from noise to picture. Raises ControlError for one
    of another number of steps or another size.
    """
    if len(trajectory) != step.total + 1:
        raise ControlError(
            f"{who} has a trajectory of {len(trajectory) - 1} steps, and the run has {step.total}: "
            "invert with as many steps as you draw."
        )
    known = trajectory[step.index + 1].to(latents)
    if known.shape[1:] != latents.shape[1:] or len(known) not in (1, sources.images):
        raise ControlError(
            f"{who} has a trajectory of shape {tuple(known.shape)}, and the run's latents are "
            f"{tuple(latents.shape)}: invert at the size of the run."
        )
    return known.expand(sources.images, *known.shape[1:])


@runtime_checkable
class Retracing(Protocol):
    """A control that needs the trajectories of pictures, from noise to picture: EditPipeline makes them.

    pictures: from the source picture, those that it needs, the source itself possibly among them; `trajectories` are
    theirs in the same order.
    """

    trajectories: Any

    def pictures(self, source: Image.Image) -> list[Image.Image]: ...
