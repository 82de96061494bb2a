"""Segment: masks of the words of a prompt from the attention of the run that draws it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from PIL import Image

from attnctrl.control import Control, Where, param
from attnctrl.controls.reading import MeanMaps, before, carried, enlarged, own_map, text_shares
from attnctrl.errors import ControlError
from attnctrl.nouns import find_pairs
from attnctrl.pairs import named, resolve_pairs
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Site
from attnctrl.stepmaps import SelfMap, phrase_maps
from attnctrl.subjects import Phrases, Subjects, phrase_lists, resolve_phrases

if TYPE_CHECKING:
    from attnctrl.run import Run

ALL = Where(kinds=("cross", "self", "joint"))
"""Every layer with text, and the self-attention before it."""


def unit_range(maps: torch.Tensor) -> torch.Tensor:
    """Each map (..., height, width) between its least value, 0, and its largest, 1; constant maps are 0."""
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)


def assigned(maps: torch.Tensor, threshold: float) -> torch.Tensor:
    """Where a map is above the threshold and no other phrase's is larger: bool (batch, phrases, height, width)."""
    best = torch.zeros_like(maps, dtype=torch.bool).scatter_(1, maps.argmax(dim=1, keepdim=True), True)
    return best & (maps > threshold)


@dataclass(frozen=True)
class Segments:
    """phrases: of each picture. maps: (pictures, phrases, height, width) in 0..1; masks: bool likewise."""

    phrases: tuple[tuple[str, ...], ...]
    maps: torch.Tensor
    masks: torch.Tensor

    def mask(self, phrase: str, image: int = 0) -> Image.Image:
        """The mask of a phrase as a picture, white inside. Raises ControlError for a phrase that was not asked for."""
        known = self.phrases[image]
        if phrase not in known:
            raise ControlError(f'picture {image} has no mask of "{phrase}": there are those of {", ".join(known)}.')
        inside = self.masks[image, known.index(phrase)].numpy()
        return Image.fromarray(inside.astype(np.uint8) * 255)


@dataclass
class State:
    """pairs: by the name of a layer with text, the self-attention before it. own: what these saw last."""

    names: list[list[str]]
    subjects: Subjects
    pairs: dict[str, tuple[Site, Site | None]]
    own: dict[str, SelfMap] = field(default_factory=dict)
    maps: MeanMaps = field(default_factory=MeanMaps)


@dataclass(frozen=True)
class Segment(Control):
    """Masks from cross-attention, as DiffuMask (Wu et al., ICCV 2023, arXiv 2303.11681) makes them before its networks.

    A phrase's map is the mean over its tokens, heads, layers and steps, apart for each grid; it is enlarged bilinearly,
    brought between 0 and 1 on each grid, and the mean over grids is taken. A pixel belongs to the phrase whose map is
    largest there, if that is above `threshold`. In place of DiffuMask's AffinityNet and CRF, which choose the threshold
    and refine the border, each layer's map is carried on by the self-attention before it, `refinements` times, as
    S-CFG does. Departures: the range begins at each map's least value, because carried maps have a floor, where the
    code divides by the largest value only; all phrases compete for a pixel, where it knows one class per picture.

    The picture stays the stock one up to rounding. Masks of other controls are not in what is read. phrases: of the
    prompt; None for its nouns, of which equal ones share a mask. After the run `segment.read(run, size)`.
    Families: all for pictures; where a layer with text has no self-attention before it (SANA), it is not refined.
    """

    paper: ClassVar[str] = "arXiv 2303.11681"
    fixes: ClassVar[str] = "a mask is wanted for what a picture shows"

    phrases: Phrases | None = None
    threshold: float = param(0.45, "value of a map, 0..1, above which a pixel belongs to its phrase", 0, 1)
    refinements: int = param(1, "how often self-attention carries a map on", 0, 8)
    where: Where = field(default=ALL, kw_only=True)

    @property
    def idle(self) -> bool:
        return self.window.empty or not named(self.phrases, None)

    def begin(self, sampling: Sampling) -> State:
        if sampling.latent_grid[0] > 1:
            raise ControlError("Segment makes masks of pictures: it has no form for videos.")
        if self.phrases is None:
            resolve_pairs(sampling)  # raises where a prompt has no noun
        names = nouns(sampling) if self.phrases is None else phrase_lists(sampling, self.phrases)
        sites = self.where.select(sampling.sites, sampling.latent_grid)
        alone = [s for s in sites if s.kind == "self"]
        pairs = {s.name: (s, before(s, alone)) for s in sites if s.kind != "self"}
        if not pairs:
            raise ControlError(f"Segment: {self.where} selects no layer with text.")
        return State(names, resolve_phrases(sampling, names), pairs)

    def sites(self, sampling: Sampling) -> list[Site]:
        chosen = self.where.select(sampling.sites, sampling.latent_grid)
        alone = [s for s in chosen if s.kind == "self"]
        text = [s for s in chosen if s.kind != "self"]
        read = {one.name for s in text for one in (s, before(s, alone)) if one is not None}
        # Without refinement self-attention is not looked at, and its stock backend runs.
        return [s for s in chosen if s.name in read and (self.refinements or s.kind != "self")]

    def inputs(self, call: Call, state: State) -> Call:
        if call.site.kind != "cross" and self.refinements:
            state.own[call.site.name] = own_map(call)
        if call.site.kind != "self":
            _, looked = state.pairs[call.site.name]
            maps = phrase_maps(text_shares(call), state.subjects.tokens)
            maps = carried(maps, None if looked is None else state.own.get(looked.name), self.refinements)
            assert call.queries.grid is not None
            state.maps.add(call.step.index, call.site.name, call.queries.grid, maps)
        return call

    def read(self, run: Run, size: tuple[int, int]) -> Segments:
        """The masks of the run's last pipeline call at `size` (width, height). Raises ControlError before there is one.

        A prompt with fewer phrases than another has empty maps behind its own.
        """
        state: State = run.state(self)
        grids = state.maps.means()
        if not grids:
            raise ControlError("Segment has read nothing: its window holds none of the steps that ran.")
        width, height = size
        maps = torch.stack([unit_range(enlarged(m, height, width)) for m in grids.values()]).mean(dim=0).cpu()
        images = len(maps) // len(state.names)
        phrases = tuple(tuple(names) for names in state.names for _ in range(images))
        return Segments(phrases, maps, assigned(maps, self.threshold))


def nouns(sampling: Sampling) -> list[list[str]]:
    """The nouns of each prompt, each once."""
    return [list(dict.fromkeys(pair.noun.text for pair in find_pairs(p))) for p in sampling.prompts or ()]
