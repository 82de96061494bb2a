"""Dynamic prompt learning: the embeddings of the nouns are learned, step by step, until each keeps to its object."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from attnctrl.control import Control, Descent, Loss, Where, Window, param
from attnctrl.controls.fidelity.attend_excite import excited_maps, neglect
from attnctrl.pairs import named, resolve_subjects
from attnctrl.sampling import Sampling
from attnctrl.sites import Grid, Step
from attnctrl.stepmaps import StepMaps, phrase_maps
from attnctrl.subjects import Phrases, Subjects

CLUSTERS, BACKGROUND = 5, 0.2
"""Segments of the picture, and the mean share of every noun's map under which a segment is background."""

ENOUGH = ((0.3, 0.5), (0.7, 1.0), (0.9, 0.5))
"""(beta, alpha) of the attention, background and disjoint losses, alpha as a fraction of the run."""


def threshold(progress: float, beta: float, alpha: float) -> float:
    """beta * e^(-progress / alpha): what a loss has to come down to."""
    return beta * math.exp(-progress / alpha)


def disjoint(maps: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """L_dj: the mean over pairs of nouns of the cosine of their maps, in [0, 1] for maps >= 0; 0 without pairs.

    maps: (batch, nouns, latent tokens); valid: (batch, nouns) bool. -> (batch,).
    """
    unit = F.normalize(maps, dim=-1)
    pairs = (valid[:, :, None] & valid[:, None]).tril(diagonal=-1)
    return (unit @ unit.transpose(1, 2) * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)


def on_background(maps: torch.Tensor, background: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """L_bg: the mean over nouns of the cosine of their map and the background (batch, latent tokens) bool; (batch,)."""
    shared = F.cosine_similarity(maps, background[:, None].to(maps.dtype), dim=-1)
    return (shared * valid).sum(dim=-1) / valid.sum(dim=-1).clamp(min=1)


def clusters(rows: torch.Tensor, count: int, rounds: int = 20) -> torch.Tensor:
    """k-means of each picture's rows (batch, n, channels) -> (batch, n) number of the cluster.

    It begins with the row farthest from the mean and then those farthest from all before: nothing is drawn.
    """
    distance = (rows - rows.mean(dim=1, keepdim=True)).norm(dim=-1)
    pick = torch.arange(len(rows), device=rows.device)
    centres = rows[pick, distance.argmax(dim=1)][:, None]
    for _ in range(count - 1):
        farthest = torch.cdist(rows, centres).amin(dim=-1).argmax(dim=1)
        centres = torch.cat([centres, rows[pick, farthest][:, None]], dim=1)
    for _ in range(rounds):
        share = F.one_hot(torch.cdist(rows, centres).argmin(dim=-1), count).to(rows.dtype)
        sums = share.transpose(1, 2) @ rows
        sizes = share.sum(dim=1)[..., None]
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return torch.cdist(rows, centres).argmin(dim=-1)


def background_of(own: torch.Tensor, maps: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Where no noun looks: the clusters of similar self-attention in which every noun's map is low.

    own: (batch, latent tokens, latent tokens) self-attention; maps: (batch, nouns, latent tokens), valid: (batch,
    nouns) bool. A noun's map counts as (m - min) / max. -> (batch, latent tokens) bool.
    """
    parts = F.one_hot(clusters(own, CLUSTERS), CLUSTERS).to(maps.dtype)
    high = (maps - maps.amin(dim=-1, keepdim=True)) / maps.amax(dim=-1, keepdim=True).clamp(min=1e-8)
    inside = high @ parts / parts.sum(dim=1, keepdim=True).clamp(min=1)  # (batch, nouns, clusters)
    best = inside.masked_fill(~valid[..., None], 0.0).amax(dim=1)
    return (parts * (best <= BACKGROUND)[:, None]).sum(dim=-1) > 0


@dataclass
class Seen:
    """own, maps: means over the steps so far. background: of this step."""

    nouns: Subjects
    own: torch.Tensor | None = None
    maps: torch.Tensor | None = None
    steps: int = 0
    step: int = -1
    background: torch.Tensor | None = None


@dataclass(frozen=True)
class DynamicPrompt(Control):
    """Dynamic Prompt Learning (Wang et al., NeurIPS 2023, arXiv 2309.15664), its learning of the nouns.

    In each step, up to `iterations` times, the embeddings of the nouns descend the attention loss (the worst noun's
    highest share of a pixel is to be 1), the background loss (cosine of a noun's map and the background) and the
    disjoint loss (cosine of two nouns' maps), until all three are under their thresholds, which fall with the run; what
    was learned stays to the end. The background is found as in the paper, by clustering self-attention, here averaged
    over the steps so far. Departures: the paper edits real pictures after an inversion, with a null-text optimisation
    that is not part of this; and it learns rows of the encoder's input table with AdamW, where this moves the encoder's
    output at the nouns' positions down the plain gradient, by a scale that suits the shapes world.
    phrases are the nouns; by default every noun of the prompt. In joint attention the background is found by the
    attention of the latents among themselves. Families: all whose text is one tensor, so not Z-Image (SANA:
    background_weight=0).
    """

    paper: ClassVar[str] = "arXiv 2309.15664"
    fixes: ClassVar[str] = "attention of a noun leaking onto other things, before an edit"

    phrases: Phrases | None = None
    scale: float = param(10.0, "step size on the embeddings", 0, 1000)
    attention_weight: float = param(1.0, "weight of the attention loss", 0, 10)
    background_weight: float = param(0.05, "weight of the background loss", 0, 10)
    disjoint_weight: float = param(0.05, "weight of the disjoint loss", 0, 10)
    iterations: int = param(20, "descents per step at most", 0, 50)
    where: Where = field(default=Where(kinds=("cross", "joint", "self"), near=1 / 16), kw_only=True)
    window: Window = field(default=Window(), kw_only=True)

    @property
    def idle(self) -> bool:
        weights = self.attention_weight + self.background_weight + self.disjoint_weight
        nothing = self.scale == 0 or self.iterations == 0 or weights == 0
        return self.window.empty or nothing or not named(self.phrases, None)

    def begin(self, sampling: Sampling) -> Seen:
        return Seen(resolve_subjects(sampling, self.phrases))

    def learned(self, state: Seen) -> torch.Tensor:
        return state.nouns.tokens.any(dim=1)

    def descent(self, step: Step) -> Descent:
        return Descent(self.scale, self.iterations)

    def loss(self, maps: StepMaps, step: Step, state: Seen) -> Loss:
        valid = state.nouns.valid
        probs, grid = maps.mean_cross()
        raw = phrase_maps(probs, state.nouns.tokens)
        losses = [
            neglect(excited_maps(maps, state.nouns), valid),
            torch.zeros_like(raw[:, 0, 0]),
            disjoint(raw, valid),
        ]
        if self.background_weight:
            losses[1] = on_background(raw, self._background(maps, raw, valid, grid, step, state), valid)
        weights = (self.attention_weight, self.background_weight, self.disjoint_weight)
        value = torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum(dim=0)
        limits = [threshold(step.progress, *one) for one in ENOUGH]
        enough = [loss.detach() <= limit for loss, limit in zip(losses, limits, strict=True)]
        return Loss(value, done=torch.stack(enough).all(dim=0))

    def _background(
        self, maps: StepMaps, raw: torch.Tensor, valid: torch.Tensor, grid: Grid, step: Step, state: Seen
    ) -> torch.Tensor:
        """The background of this step, found once in it."""
        if state.background is None or state.step != step.index:
            layers = [layer.detached().dense() for layer in maps.self_layers(grid)]
            own, seen = torch.stack(layers).mean(dim=0), raw.detach()
            if state.own is not None and state.maps is not None:
                own = state.own + (own - state.own) / (state.steps + 1)
                seen = state.maps + (seen - state.maps) / (state.steps + 1)
            state.own, state.maps, state.steps, state.step = own, seen, state.steps + 1, step.index
            state.background = background_of(own, seen, valid)
        return state.background
