"""CONFORM: maps of words that belong together are pulled together, all others are pushed apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from attnctrl.control import Control, Descent, Loss, Where, Window, param
from attnctrl.controls.fidelity.attend_excite import excited_maps
from attnctrl.controls.fidelity.descents import Memory, refined, step_size
from attnctrl.pairs import Pairs, Words, named, resolve_pairs
from attnctrl.sampling import Sampling
from attnctrl.sites import Step
from attnctrl.stepmaps import StepMaps, blur, phrase_maps
from attnctrl.subjects import Phrases

# Stands for log 0: the gradient of a sum over nothing would be NaN.
_NOTHING = -1e4


def grouping(vectors: torch.Tensor, group: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised temperature-scaled cross entropy (NT-Xent) over words, other positives not in the denominator.

    For ordered pairs (a, p) of one group: -log(e^s(a,p) / (e^s(a,p) + sum over n of other groups e^s(a,n))), with s
    the cosine over the temperature; the mean over pairs. vectors: (batch, words, latent tokens); group: (batch, words)
    number, -1 for padding. -> (batch,) loss, 0 without pairs, and (batch,) number of pairs.
    """
    unit = F.normalize(vectors, dim=-1)
    similar = unit @ unit.transpose(1, 2) / temperature
    valid = (group >= 0)[:, :, None] & (group >= 0)[:, None]
    equal = group[:, :, None] == group[:, None]
    itself = torch.eye(group.shape[1], dtype=torch.bool, device=group.device)
    positive = valid & equal & ~itself
    negative = similar.masked_fill(~(valid & ~equal), _NOTHING).logsumexp(dim=-1, keepdim=True)
    pairs = positive.sum(dim=(1, 2))
    return (F.softplus(negative - similar) * positive).sum(dim=(1, 2)) / pairs.clamp(min=1), pairs


@dataclass(frozen=True)
class Conform(Control):
    """CONFORM: Contrast is All You Need (Meral et al., CVPR 2024, arXiv 2312.06059).

    Each noun with its attributes is a group. The loss (NT-Xent) pulls the maps of a group together, those of the step
    before included, and pushes other groups away; with the step sizes of Attend-and-Excite in the first half of the
    run, and `refinements` further descents at 0, 20 and 40 percent. Departures from the official code: a word has one
    map, the mean over its tokens; the memory holds no graph, is kept per picture and never written to; steps without
    two maps to pull together (bare nouns in the first step) are skipped. The recipe of the authors' notebook takes
    maps as they are; `shares` makes them shares of the words, as their pipeline does by default.
    phrases, pairs: see `resolve_pairs`; by default every pair of the prompt. Families: all.
    """

    paper: ClassVar[str] = "arXiv 2312.06059"
    fixes: ClassVar[str] = "two subjects melted together, a colour on the wrong thing"

    phrases: Phrases | None = None
    pairs: Pairs | None = None
    scale: float = param(20.0, "step size at the start", 0, 1000)
    temperature: float = param(0.5, "temperature of the contrast", 0.01, 10)
    shares: bool = param(False, "make maps shares of the words first")
    iterations: int = param(1, "descents per step", 0, 50)
    refinements: int = param(20, "further descents at 0, 20 and 40 percent of the run", 0, 50)
    window: Window = field(default=Window(0.0, 0.5), kw_only=True)
    where: Where = field(default=Where(near=1 / 16), kw_only=True)

    @property
    def idle(self) -> bool:
        nothing = self.iterations == 0 and self.refinements == 0
        return self.window.empty or self.scale == 0 or nothing or not named(self.phrases, self.pairs)

    def begin(self, sampling: Sampling) -> Memory:
        return Memory(resolve_pairs(sampling, self.phrases, self.pairs))

    def descent(self, step: Step) -> Descent:
        more = 0 if refined(step) is None else self.refinements
        return Descent(step_size(self.scale, step), self.iterations + more)

    def loss(self, maps: StepMaps, step: Step, state: Memory) -> Loss:
        words: Words = state.about
        if self.shares:
            found = excited_maps(maps, words)
        else:
            probs, grid = maps.mean_cross()
            found = blur(phrase_maps(probs, words.tokens), grid)
        before = state.exchange(step, found)
        group = words.group
        if before is not None:
            found, group = torch.cat([found, before], dim=1), torch.cat([group, group], dim=1)
        value, pairs = grouping(found, group, self.temperature)
        return Loss(value, done=pairs == 0)
