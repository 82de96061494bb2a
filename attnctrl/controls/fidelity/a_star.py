"""A-STAR: keep the maps of different concepts apart, and keep what a concept already had."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from attnctrl.control import Control, Descent, Loss, Where, Window, param
from attnctrl.controls.fidelity.attend_excite import excited_maps
from attnctrl.controls.fidelity.descents import Memory, step_size
from attnctrl.sampling import Sampling
from attnctrl.sites import Step
from attnctrl.stepmaps import StepMaps
from attnctrl.subjects import Phrases, Subjects, flat, resolve_phrases


def segregation(maps: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """L_seg (eq. 2): over pairs of concepts, sum min(A_m, A_n) / sum (A_m + A_n); each pair is in [0, 0.5].

    maps: (batch, concepts, latent tokens) >= 0; valid: (batch, concepts) bool. -> (batch,).
    """
    count = maps.shape[1]
    first, second = torch.triu_indices(count, count, offset=1, device=maps.device)
    one, two = maps[:, first], maps[:, second]
    overlap = torch.minimum(one, two).sum(dim=-1) / (one + two).sum(dim=-1).clamp(min=1e-8)
    return (overlap * (valid[:, first] & valid[:, second])).sum(dim=-1)


def retention(maps: torch.Tensor, kept: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """L_ret (eq. 3): over concepts, 1 - sum min(A, B) / sum (A + B); each term is in [0.5, 1].

    maps: (batch, concepts, latent tokens), with maximum 1; kept: B, the binary map of the step before. -> (batch,).
    """
    overlap = torch.minimum(maps, kept).sum(dim=-1) / (maps + kept).sum(dim=-1).clamp(min=1e-8)
    return ((1 - overlap) * valid).sum(dim=-1)


@dataclass(frozen=True)
class AStar(Control):
    """A-STAR: Test-time Attention Segregation and Retention (Agarwal et al., ICCV 2023, arXiv 2306.14544).

    L = segregation_weight * L_seg + retention_weight * L_ret, descended with Attend-and-Excite's step sizes in the
    first half of the run. No official code is public. Open points settled here: maps are prepared as in
    Attend-and-Excite and divided by their maximum, so that the binary memory does not dominate; the memory of a
    concept is where its map in the previous step exceeded `threshold` of its maximum. In the first step L_ret is 0.
    scales "parity" takes the formulas literally, without the division and with a sum over pairs that grows with the
    square of the concepts; "mean" divides and averages over pairs.
    Attributes are not treated: give nouns. In joint attention the maps are shares of the attention to text.
    Families: all.
    """

    paper: ClassVar[str] = "arXiv 2306.14544"
    fixes: ClassVar[str] = "two subjects melted together, a subject fading during the run"

    phrases: Phrases = ()
    scale: float = param(20.0, "step size at the start", 0, 1000)
    segregation_weight: float = param(1.0, "weight of L_seg", 0, 10)
    retention_weight: float = param(1.0, "weight of L_ret", 0, 10)
    threshold: float = param(0.5, "what of a map is kept, as a fraction of its maximum", 0, 1)
    scales: str = param("sum", "maps by their maximum, pairs summed or averaged", choices=("sum", "mean", "parity"))
    iterations: int = param(1, "descents per step", 0, 50)
    window: Window = field(default=Window(0.0, 0.5), kw_only=True)
    where: Where = field(default=Where(near=1 / 16), kw_only=True)

    @property
    def idle(self) -> bool:
        none = self.segregation_weight == 0 and self.retention_weight == 0
        return self.window.empty or self.scale == 0 or self.iterations == 0 or none or not flat(self.phrases)

    def begin(self, sampling: Sampling) -> Memory:
        return Memory(resolve_phrases(sampling, self.phrases))

    def descent(self, step: Step) -> Descent:
        return Descent(step_size(self.scale, step), self.iterations)

    def loss(self, maps: StepMaps, step: Step, state: Memory) -> Loss:
        subjects: Subjects = state.about
        valid = subjects.valid
        concepts = excited_maps(maps, subjects)
        top = concepts.amax(dim=-1, keepdim=True).clamp(min=1e-8)
        kept = state.exchange(step, (concepts > self.threshold * top).float())
        concepts = concepts if self.scales == "parity" else concepts / top
        value = self.segregation_weight * segregation(concepts, valid)
        if self.scales == "mean":
            count = valid.sum(dim=-1)
            value = value / (count * (count - 1) / 2).clamp(min=1)
        if kept is not None:
            value = value + self.retention_weight * retention(concepts, kept, valid)
        return Loss(value)
