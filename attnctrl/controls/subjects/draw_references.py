"""Given pictures as further rows of a run: each at the noise of the step, so that other rows can look at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, param
from attnctrl.controls.subjects.rows import References
from attnctrl.errors import ControlError
from attnctrl.guidance import Prediction
from attnctrl.references import Subject
from attnctrl.sampling import Sampling
from attnctrl.sites import Step


@dataclass
class State:
    """clean: the references' latents (references * images, channels, height, width), from the first step on."""

    rows: References
    sampling: Sampling
    clean: torch.Tensor | None = None


@dataclass(frozen=True)
class DrawReferences(Control):
    """References drawn along with the pictures: prompt=[picture, ..., *reference_prompts(subjects)].

    Their rows end in the given pictures whatever the model predicts. `noise` "one": each keeps the noise that it starts
    from (its prediction becomes the one that leads to the picture, as in virtual inversion, arXiv 2312.04965); "fresh":
    it is noised anew after every step with the generator of `seed`, as in MagicFace's code (2408.07433). With a
    `noise_scale` below 1, which is nobody's paper, references can be made out earlier than the pictures. With
    `trajectory`, (steps + 1, references, channels, height, width) from noise to picture, its latents are those: what
    an inversion found. Without this control the model draws the references from their prompts, as IR-Diffusion does
    (2411.19261). A reference of other proportions than the picture is padded by its own edge.
    Families: every one for pictures.
    """

    paper: ClassVar[str] = "arXiv 2312.04965; arXiv 2408.07433"
    fixes: ClassVar[str] = "given pictures of a subject for a run to look at"

    subjects: Sequence[Subject] = ()
    trajectory: Any = field(default=None, compare=False, kw_only=True)
    noise_kind: str = param("one", "one noise for the run, or a fresh one in every step", choices=("one", "fresh"))
    noise_scale: float = param(1.0, "how much noise the references have, relative to the pictures", 0, 1)
    seed: int = param(0, "of the fresh or scaled noise", 0, 2**31 - 1)

    @property
    def idle(self) -> bool:
        return self.window.empty or not self.subjects

    @property
    def _set_anew(self) -> bool:
        """Whether the references' latents are put there after every step."""
        return self.noise_kind == "fresh" or self.noise_scale < 1

    def begin(self, sampling: Sampling) -> State:
        return State(References.of(sampling, self.subjects, self.name), sampling)

    def guide(self, prediction: Prediction, step: Step, state: State) -> torch.Tensor:
        first = state.rows.pictures.stop
        if state.clean is None:
            like = prediction.cond[first:]
            _, height, width = state.sampling.latent_grid
            pictures = [
                one.fitted(height, width).picture for _, one in state.rows.all for _ in range(state.rows.images)
            ]
            assert state.sampling.clean is not None
            state.clean = state.sampling.clean(pictures, like)
        if self._set_anew or self.trajectory is not None:
            return prediction.combined
        whole = torch.cat([torch.zeros_like(prediction.combined[:first]), state.clean.to(prediction.combined)])
        known = prediction.toward(whole)[first:].to(prediction.combined.dtype)
        return torch.cat([prediction.combined[:first], known])

    def latents(self, latents: torch.Tensor, step: Step, state: State) -> torch.Tensor:
        first = state.rows.pictures.stop
        if state.clean is None:
            return latents
        if self.trajectory is not None:
            known = self._follow(latents[first:], step, state.rows.images)
        elif step.index == step.total - 1:
            known = state.clean  # without what the rounding of the steps has left
        elif self._set_anew:
            assert state.sampling.noised_next is not None
            draw = step.index if self.noise_kind == "fresh" else -1
            generator = torch.Generator().manual_seed(hash((self.seed, draw)) % 2**63)
            noise = torch.randn(state.clean.shape, generator=generator).to(state.clean)
            known = state.sampling.noised_next(state.clean, self.noise_scale * noise, step)
        else:
            return latents
        return torch.cat([latents[:first], known.to(latents)])

    def _follow(self, latents: torch.Tensor, step: Step, images: int) -> torch.Tensor:
        if len(self.trajectory) != step.total + 1 or self.trajectory.shape[2:] != latents.shape[1:]:
            raise ControlError(
                f"DrawReferences has a trajectory of shape {tuple(self.trajectory.shape)} for a run of {step.total} "
                f"steps and latents of {tuple(latents.shape[1:])}: invert with the steps and the size of the run."
            )
        known = self.trajectory[step.index + 1].repeat_interleave(images, dim=0)
        if len(known) != len(latents):
            raise ControlError(
                f"DrawReferences has trajectories of {len(known) // images} references for {len(latents) // images}: "
                "give one for each."
            )
        return known
