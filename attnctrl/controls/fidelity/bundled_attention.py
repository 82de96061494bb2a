"""Bundled attention: each attribute's map takes the shape of its noun's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from attnctrl.control import Control, Descent, Loss, Where, Window, param
from attnctrl.controls.fidelity.attend_excite import excited_maps
from attnctrl.controls.fidelity.descents import step_size
from attnctrl.errors import ControlError
from attnctrl.pairs import Pairs, Words, named, resolve_pairs
from attnctrl.sampling import Sampling
from attnctrl.sites import Step
from attnctrl.stepmaps import StepMaps
from attnctrl.subjects import Phrases


def bundling(maps: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """The mean of 1 - cosine(noun, attribute) over pairs, in [0, 1] for maps >= 0; 0 without pairs.

    maps: (batch, words, latent tokens); pairs: (batch, words, words) bool. -> (batch,).
    """
    unit = F.normalize(maps, dim=-1)
    apart = 1 - unit @ unit.transpose(1, 2)
    return (apart * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)


@dataclass(frozen=True)
class BundledAttention(Control):
    """The semantic-bundled cross-attention of DiffCloth (Zhang et al., ICCV 2023, arXiv 2308.11206), at inference.

    The paper trains on garments with a loss that gives the map of each adjective the structure of its noun's; here the
    same distance is descended on the latents while sampling, as by the other losses of this task. No official code is
    public. Open points settled here: the distance is 1 - cosine, maps and step sizes are Attend-and-Excite's, in the
    first half of the run. It moves neither subject apart from the other: `Conform` does both.
    phrases, pairs: see `resolve_pairs`; by default every pair of the prompt. Raises ControlError when no prompt gives
    a noun an attribute. Families: all.
    """

    paper: ClassVar[str] = "arXiv 2308.11206"
    fixes: ClassVar[str] = "a colour on the wrong thing"

    phrases: Phrases | None = None
    pairs: Pairs | None = None
    scale: float = param(20.0, "step size at the start", 0, 1000)
    iterations: int = param(1, "descents per step", 0, 50)
    window: Window = field(default=Window(0.0, 0.5), kw_only=True)
    where: Where = field(default=Where(near=1 / 16), kw_only=True)

    @property
    def idle(self) -> bool:
        none = self.scale == 0 or self.iterations == 0
        return self.window.empty or none or not named(self.phrases, self.pairs)

    def begin(self, sampling: Sampling) -> Words:
        words = resolve_pairs(sampling, self.phrases, self.pairs)
        if not words.bound.any():
            raise ControlError(
                "BundledAttention found no attribute of any noun in the prompt: name them with "
                'pairs=[("red", "circle"), ...].'
            )
        return words

    def descent(self, step: Step) -> Descent:
        return Descent(step_size(self.scale, step), self.iterations)

    def loss(self, maps: StepMaps, step: Step, state: Words) -> Loss:
        return Loss(bundling(excited_maps(maps, state), state.bound))
