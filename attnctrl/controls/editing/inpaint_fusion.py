"""Inpainting by noise fusion: only the regions are drawn anew, everything else is led back to a given picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, param
from attnctrl.errors import ControlError
from attnctrl.guidance import Prediction
from attnctrl.layout import Regions, per_prompt
from attnctrl.sampling import Sampling
from attnctrl.sites import Step


def fused(model: torch.Tensor, source: torch.Tensor, inside: torch.Tensor, weight: float) -> torch.Tensor:
    """The model's prediction inside, and (source + weight * model) / (1 + weight) outside.

    model, source: (batch, channels, height, width); inside: bool (batch, 1, height, width).
    """
    return torch.where(inside, model, (source + weight * model) / (1 + weight))


@dataclass
class State:
    """clean, inside: the source's latents and the regions on their grid, known from the first prediction on."""

    sampling: Sampling
    clean: torch.Tensor | None = None
    inside: torch.Tensor | None = None


@dataclass(frozen=True)
class InpaintFusion(Control):
    """Region-guided noise fusion of EliGen (Zhang et al., arXiv 2501.01097); repainting of RAG (2411.06558).

    Outside the regions the prediction is the one that leads from the current latents to `source`, which under
    rectified flow is (z_t - z_0) / sigma; `background_weight` mixes in the model's own. So the rest of the picture is
    the source at the noise of the moment, and at the end it is the source itself, bit for bit (with
    `background_weight` 0). A latent pixel is inside when any part of it is. Put this control after EliGen, RAG or
    another that says what is drawn inside.
    EliGen's code fuses the conditional prediction "before" guidance, which at scale s leaves
    s * source - (s - 1) * unconditional outside, and the background drifts. The default is "after".
    Departures: RAG copies the latents of every step of the earlier run, and its hidden states, where this needs its
    result alone. From a source alone the run starts from noise; start later by an image-to-image pipeline's strength.
    Families: every one for pictures.
    """

    paper: ClassVar[str] = "arXiv 2501.01097; arXiv 2411.06558"
    fixes: ClassVar[str] = "edits that change the rest of the picture"

    regions: Regions = ()
    source: Any = field(default=None, compare=False)
    background_weight: float = param(0.0, "weight of the model's prediction outside, beside the source's 1", 0, 10)
    fuse: str = param("after", "after guidance, or before it as in the official code", choices=("after", "before"))

    @property
    def idle(self) -> bool:
        return self.window.empty or not any(self.regions)

    def begin(self, sampling: Sampling) -> State:
        if self.source is None:
            raise ControlError(
                "InpaintFusion needs the picture that is kept outside the regions: give source=..., a picture or "
                'what the pipeline returned for output_type="latent".'
            )
        _, height, width = sampling.latent_grid
        for regions in per_prompt(self.regions, sampling.prompt_count):
            for region in regions:
                region.check_aspect(height, width)
        return State(sampling)

    def _inside(self, sampling: Sampling, like: torch.Tensor) -> torch.Tensor:
        """(batch, 1, height, width) bool; a prompt without regions is left to the model everywhere."""
        height, width = like.shape[-2:]
        rows = torch.ones(sampling.prompt_count, 1, height, width, dtype=torch.bool)
        for p, regions in enumerate(per_prompt(self.regions, sampling.prompt_count)):
            if regions:
                masks = [region.raster(height, width, "any") > 0 for region in regions]
                rows[p, 0] = torch.stack(masks).any(dim=0)
        return rows.repeat_interleave(sampling.images_per_prompt, dim=0).to(like.device)

    def guide(self, prediction: Prediction, step: Step, state: State) -> torch.Tensor:
        if state.clean is None or state.inside is None:
            assert state.sampling.clean is not None
            state.clean = state.sampling.clean(self.source, prediction.cond)
            state.inside = self._inside(state.sampling, prediction.cond)
        source = prediction.toward(state.clean)
        if self.fuse == "after" or prediction.uncond is None:
            return fused(prediction.combined, source, state.inside, self.background_weight)
        cond = fused(prediction.cond, source, state.inside, self.background_weight)
        return prediction.guided(cond)

    def latents(self, latents: torch.Tensor, step: Step, state: State) -> torch.Tensor:
        """After the last step, without what the rounding of the steps has left."""
        drifts = self.background_weight or self.fuse == "before"
        if step.index < step.total - 1 or drifts or state.clean is None or state.inside is None:
            return latents
        return torch.where(state.inside, latents, state.clean.to(latents.dtype))
