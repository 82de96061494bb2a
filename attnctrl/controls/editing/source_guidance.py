"""Guidance of its own for the source of an edit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from attnctrl.control import Control, param
from attnctrl.controls.editing.sources import Sources
from attnctrl.guidance import Prediction
from attnctrl.sampling import Sampling
from attnctrl.sites import Step


@dataclass(frozen=True)
class SourceGuidance(Control):
    """The guidance scale of the source in a run that draws it beside its edits: prompt=[source, edit, ...].

    An inversion at scale 1 is only retraced at scale 1, whereas edits want more: Prompt-to-Prompt on given pictures,
    edit-friendly DDPM (3.5 and 15) and FlowEdit (1.5 and 5.5) all keep two. Without classifier-free guidance there is
    nothing to do. Families: all.
    """

    paper: ClassVar[str] = "arXiv 2304.06140, table 3; arXiv 2412.08629"
    fixes: ClassVar[str] = "a source picture that is not reproduced"

    scale: float = param(1.0, "guidance scale of the source", 0, 100)

    def begin(self, sampling: Sampling) -> Sources:
        return Sources.of(sampling, self.name)

    def guide(self, prediction: Prediction, step: Step, state: Sources) -> torch.Tensor:
        if prediction.uncond is None:
            return prediction.combined
        assert prediction.textless is not None
        start = prediction.uncond if prediction.image is None else prediction.guided(prediction.image)
        own = start + self.scale * (prediction.cond - prediction.textless)
        return torch.where(state.edits(own), prediction.combined, own)
