"""Semantic protection: where a concept is drawn, the words of the other concepts are hidden."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from attnctrl.control import Control, Where, param
from attnctrl.errors import ControlError
from attnctrl.pairs import Pairs, Words, named, resolve_pairs
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid
from attnctrl.stepmaps import SelfMap, StepMaps, phrase_maps
from attnctrl.subjects import Phrases


def unit(maps: torch.Tensor) -> torch.Tensor:
    """Each map (..., latent tokens) stretched to 0..1."""
    low, high = maps.amin(dim=-1, keepdim=True), maps.amax(dim=-1, keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-12)


def seeds(maps: torch.Tensor, grid: Grid, threshold: float) -> torch.Tensor:
    """Where each noun's map is near its largest value, bool (batch, concepts, latent tokens); the border never is."""
    _, height, width = grid
    framed = unit(maps).unflatten(-1, (height, width)).clone()
    if min(height, width) > 2:
        framed[..., [0, -1], :] = 0
        framed[..., :, [0, -1]] = 0
    return unit(framed.flatten(-2)) > threshold


def protected(spread: torch.Tensor, valid: torch.Tensor, threshold: float) -> torch.Tensor:
    """Where each concept is, bool (batch, concepts, latent tokens).

    spread: every pixel's attention to the concept's seeds. What a concept has beyond the mean of the others counts.
    """
    unit_spread = unit(spread) * valid[..., None]
    count = valid.sum(dim=-1).clamp_min(2)[:, None, None]
    others = (unit_spread.sum(dim=1, keepdim=True) - unit_spread) / (count - 1)
    return (unit((unit_spread - others).clamp_min(0)) > threshold) & valid[..., None]


def hidden_words(tokens: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """What a pixel does not see, bool (batch, latent tokens, text tokens): inside concepts the words of all others.

    tokens: (batch, concepts, text tokens) bool; inside: (batch, concepts, latent tokens) bool.
    """
    own = torch.einsum("bcq,bct->bqt", inside.float(), tokens.float()) > 0
    return inside.any(dim=1)[:, :, None] & tokens.any(dim=1)[:, None] & ~own


@dataclass
class State:
    """tokens, nouns: (batch, concepts, text tokens) bool, all words of each and its noun. inside: on `grid`."""

    tokens: torch.Tensor
    nouns: torch.Tensor
    inside: torch.Tensor | None = None
    grid: Grid | None = None
    hidden: dict[Grid, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class SemanticProtection(Control):
    """SPDiffusion's SP-Mask (Zhang et al., arXiv 2409.01327): attributes stay with their object, from the prompt alone.

    Before the first step the maps of the start are read: a noun's strongest places are its seeds, and what attends to
    them, beyond the mean of the others, is the concept's region. There the words of the other concepts are hidden in
    every layer that attends to text. Concepts are the prompt's nouns with their attributes, or `pairs`; one alone has
    nothing to be protected from. Departures: the official code draws two steps first, averages their maps and replays
    their self-attention in a second run; this reads the maps of the first step and draws once. Of three concepts and
    more the regions may overlap: there the words of all of them are seen, where the code hides all. The negative prompt
    is left alone. Families: those with separate text keys.
    """

    paper: ClassVar[str] = "arXiv 2409.01327"
    fixes: ClassVar[str] = "an attribute of one named object on another"

    phrases: Phrases | None = None
    pairs: Pairs | None = field(default=None, kw_only=True)
    cross_threshold: float = param(0.9, "of a noun's map, stretched to 0..1, for its seeds", 0, 1)
    self_threshold: float = param(0.1, "of the attention to the seeds, for the region", 0, 1)
    near: float = param(1 / 16, "the maps that are read, as a share of the latents' tokens", 0, 1)
    where: Where = field(default=Where(kinds=("cross",)), kw_only=True)

    @property
    def idle(self) -> bool:
        return self.window.empty or not named(self.phrases, self.pairs)

    def begin(self, sampling: Sampling) -> State:
        words: Words = resolve_pairs(sampling, self.phrases, self.pairs)
        count = max(int(words.group.max()) + 1, 1)
        member = words.group[:, None] == torch.arange(count, device=sampling.device)[None, :, None]
        tokens = torch.einsum("bcw,bwt->bct", member.float(), words.tokens.float()) > 0
        nouns = torch.einsum("bcw,bwt->bct", (member & words.noun[:, None]).float(), words.tokens.float()) > 0
        if {"cross", "self"} - {site.kind for site in sampling.sites}:
            raise ControlError(
                "SemanticProtection reads self-attention and masks text keys, each in layers of its own, which this "
                "model has not: use RegionMask with regions."
            )
        return State(tokens, nouns)

    def noise(self, noise: torch.Tensor, sampling: Sampling, state: State) -> torch.Tensor:
        assert sampling.maps_of is not None
        maps = sampling.maps_of(noise, Where(kinds=("cross", "self"), near=self.near))
        state.inside, state.grid = self._regions(maps, state)
        return noise

    def _regions(self, maps: StepMaps, state: State) -> tuple[torch.Tensor, Grid]:
        mean, grid = maps.mean_cross()
        start = seeds(phrase_maps(mean, state.nouns), grid, self.cross_threshold).float()
        share = (start / start.sum(dim=-1, keepdim=True).clamp_min(1)).transpose(1, 2)
        layers: list[SelfMap] = maps.self_layers(grid)
        spread = torch.stack([layer.apply(share) for layer in layers]).mean(dim=0).transpose(1, 2)
        return protected(spread, state.nouns.any(dim=-1), self.self_threshold), grid

    def mask(self, call: Call, state: State) -> torch.Tensor | None:
        grid = call.queries.grid
        assert grid is not None
        if state.inside is None or state.grid is None:
            return None  # a run that begins later than its window has no start to read
        if grid not in state.hidden:
            regions = state.inside.float().unflatten(-1, state.grid[1:])
            resized = F.interpolate(regions, size=grid[1:], mode="nearest-exact").flatten(-2) > 0
            state.hidden[grid] = ~hidden_words(state.tokens, resized)[:, None]
        return state.hidden[grid]
