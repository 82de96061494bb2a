"""Null-text optimisation: the empty prompt's embedding is tuned until the guided source follows its trajectory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, param
from attnctrl.controls.editing.sources import Sources
from attnctrl.errors import ControlError
from attnctrl.guidance import Crop, Prediction
from attnctrl.sampling import Sampling
from attnctrl.sites import Step


def ddim_step(sample: torch.Tensor, noise: torch.Tensor, kept: float, after: float) -> torch.Tensor:
    """Deterministic DDIM: the latents at a share `after` of the picture's variance from those at `kept`."""
    clean = (sample - (1 - kept) ** 0.5 * noise) / kept**0.5
    return after**0.5 * clean + (1 - after) ** 0.5 * noise


@dataclass
class State:
    """embedding: (pictures of the source, tokens, channels), as tuned so far. latents: those of the source now."""

    sources: Sources
    embedding: torch.Tensor
    latents: torch.Tensor | None = None


@dataclass(frozen=True)
class NullText(Control):
    """Null-text inversion (Mokady et al., arXiv 2211.09794): a source that comes back under guidance.

    The run draws the source and its edits together: prompt=[source, edit, ...]. In every step the embedding of the
    empty prompt, beginning with that of the step before, is tuned by Adam until the source's guided step ends at the
    next latents of `trajectory`, (steps + 1, 1 or pictures, channels, height, width) from noise to picture; its
    prediction takes the place of the unconditional one, for the edits too. As in the official code the rate is 0.01
    (1 - step / 100) and a step ends below a mean squared error of 1e-5 + step 2e-5. kept: the share of the picture's
    variance at each of these steps, under the deterministic DDIM scheduler that the run must have. Costs `iterations`
    passes and gradients a step. On the small shapes model a rate of 0.03 tunes ten times better than the paper's.
    Families: UNets that predict noise.
    """

    paper: ClassVar[str] = "arXiv 2211.09794"
    fixes: ClassVar[str] = "a source picture that is not reproduced"

    trajectory: Any = field(default=None, compare=False)
    kept: Any = field(default=None, compare=False)
    iterations: int = param(10, "steps of Adam in each step of the run, at most", 0, 100)
    rate: float = param(0.01, "learning rate in the first step", 0, 1)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.trajectory is None or self.iterations == 0

    def begin(self, sampling: Sampling) -> State:
        if not sampling.guided:
            raise ControlError("NullText tunes the unconditional embedding, and this run has no guidance.")
        sources = Sources.of(sampling, self.name)
        empty = sampling.encode([""]).positive.float()
        return State(sources, empty.repeat(sources.images, 1, 1))

    def guide(self, prediction: Prediction, step: Step, state: State) -> torch.Tensor:
        assert prediction.uncond is not None
        images = state.sources.images
        self._tune(prediction, step, state)
        embedding = state.embedding.repeat(state.sources.prompts, 1, 1).to(prediction.cond.dtype)
        uncond = prediction.again(embedding, branch="uncond")
        assert len(uncond) == images * state.sources.prompts
        return uncond + prediction.scale * (prediction.cond - uncond)

    def _tune(self, prediction: Prediction, step: Step, state: State) -> None:
        own = slice(0, state.sources.images)
        cond, scale = prediction.cond[own].float(), prediction.scale
        wanted, now = self.trajectory[step.index + 1].to(cond), state.latents
        now = self.trajectory[step.index].to(cond) if now is None else now.float()
        levels = float(self.kept[step.index]), float(self.kept[step.index + 1])
        whole = Crop(own, slice(0, cond.shape[-2]), slice(0, cond.shape[-1]))
        with torch.inference_mode(False), torch.enable_grad():
            leaf = state.embedding.clone().requires_grad_(True)
            adam = torch.optim.Adam([leaf], lr=self.rate * (1 - step.index / 100))
            for _ in range(self.iterations):
                uncond = prediction.again(leaf.to(prediction.cond.dtype), crop=whole, branch="uncond").float()
                drawn = ddim_step(now, uncond + scale * (cond - uncond), *levels)
                loss = (drawn - wanted).square().mean()
                if float(loss.detach()) < 1e-5 + step.index * 2e-5:
                    break
                (leaf.grad,) = torch.autograd.grad(loss, leaf)
                adam.step()
        state.embedding = leaf.detach()

    def latents(self, latents: torch.Tensor, step: Step, state: State) -> torch.Tensor:
        state.latents = latents[: state.sources.images]
        return latents
