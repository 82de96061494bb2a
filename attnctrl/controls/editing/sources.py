"""The source among the pictures of a run: what every edit of two branches shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnctrl.errors import ControlError
from attnctrl.sampling import Sampling


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
