"""RAG: regions drawn on their own first, then text of their own in the picture as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Where, param
from attnctrl.controls.layout.eligen import hidden_groups
from attnctrl.controls.layout.entities import (
    Entities,
    Places,
    beside,
    both_in_sequence,
    check_whole,
    with_entities,
)
from attnctrl.controls.layout.region_prompts import RegionPrompts
from attnctrl.guidance import Crop, Prediction
from attnctrl.kernels.groups import TokenGroups
from attnctrl.layout import Regions, per_prompt
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Step
from attnctrl.text import Text


def regional_groups(places: Places) -> TokenGroups:
    """All latents see each other; those of a region see its text, the others the prompt. Every text sees all latents.

    Latents of several regions see the text of all of them.
    """
    covered = places.inside.any(dim=1)
    anyone = places.prompt | places.latents | places.entities.any(dim=1)
    prompt_readers = places.prompt | (places.latents & ~covered)
    readers = places.entities | places.inside
    queries = torch.stack([anyone, prompt_readers, *readers.unbind(1)], dim=-1)
    keys = torch.stack([places.latents, places.prompt, *places.entities.unbind(1)], dim=-1)
    return TokenGroups.from_members(queries, keys)


def global_groups(places: Places) -> TokenGroups:
    """What the prompt says of the regions: their latents see it and all latents."""
    covered = places.inside.any(dim=1)
    return TokenGroups.from_members(covered[..., None], (places.prompt | places.latents)[..., None])


def box_of(mask: torch.Tensor) -> tuple[slice, slice]:
    """The rows and columns that a mask (height, width), not all zero, spans."""
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def bind(whole: torch.Tensor, part: torch.Tensor, inside: torch.Tensor, crop: Crop) -> torch.Tensor:
    """`whole` (batch, channels, height, width) with `part` in place of it in the crop, where `inside` is true.

    inside: bool, the latent tokens (height, width) of the crop; each is a block of `part`'s pixels.
    """
    side = part.shape[-1] // inside.shape[-1]
    mask = inside.repeat_interleave(side, dim=0).repeat_interleave(side, dim=1)
    rows, columns = (slice(side * s.start, side * s.stop) for s in (crop.rows, crop.columns))
    bound = whole.clone()
    place = bound[crop.pictures, :, rows, columns]
    place.copy_(torch.where(mask, part.to(place.dtype), place))
    return bound


@dataclass(frozen=True)
class Bound:
    """A region of one prompt: what is drawn on its own, under which text, and where inside of it the result counts."""

    crop: Crop
    inside: torch.Tensor
    text: Text


@dataclass(frozen=True)
class State:
    """entities: the text blocks of joint attention. prompts: the same refinement where text has keys of its own."""

    bound: list[Bound]
    entities: Entities | None = None
    prompts: tuple[RegionPrompts, Any] | None = None


@dataclass(frozen=True)
class RAG(Control):
    """Region-Aware Text-to-Image Generation via Hard Binding and Soft Refinement (Chen et al., arXiv 2411.06558).

    Hard binding: in the first part of the run each region is a picture of its own. The denoiser sees its latents
    alone, in a picture of the size of its bounding box, under `Region.phrase`, and what it predicts is what the region
    gets, under classifier-free guidance in both branches. Drawing from the same noise and pasting the prediction in
    every step is drawing the regions apart and pasting their latents before the first common step; it needs no second
    scheduler, so every scheduler will do. Of overlapping regions the later one is on top. The model must know pictures
    of the boxes' sizes: one trained at a single size, as on the shapes world, draws nothing of use in them.
    Soft refinement: in every layer the latents of a region see its own text, `Region.prompt` or else the phrase, beside
    all latents, and of the result `soft_refinement` is taken, of the stock attention the rest. Regions may have any
    shape and need not tile the picture; what they leave uncovered follows the prompt.
    Departures: outside the regions the denoiser reads the picture with the pasted latents, but not the regions' hidden
    states; the refinement's regions are those of the binding; of each text `entity_tokens` tokens are kept, where the
    official code keeps 512; both phases are shares of the run, where it counts steps (2, 3 or 8 of 20). To repaint a
    region and keep the rest of an earlier picture, add InpaintFusion.
    Families: joint attention; those with text keys, where the refinement is that of RegionPrompts. Hard binding: UNets,
    Stable Diffusion 3, PixArt, SANA, FLUX.1 and QwenImage; elsewhere set it to 0.
    """

    paper: ClassVar[str] = "arXiv 2411.06558"
    fixes: ClassVar[str] = "objects in the wrong place, different descriptions for different parts of the picture"

    regions: Regions = ()
    hard_binding: float = param(0.15, "share of the run in which every region is drawn on its own", 0, 1)
    soft_refinement: float = param(1.0, "share of the region's text in what its latents read; 0 is the stock", 0, 1)
    until: float = param(1.0, "share of the run in which regions are refined", 0, 1)
    entity_tokens: int = param(64, "text tokens kept of each region", 1, 512)
    branches: tuple[str, ...] = field(default=("cond", "uncond"), kw_only=True)
    where: Where = field(default=Where(kinds=("cross", "joint")), kw_only=True)

    @property
    def refines(self) -> bool:
        """Whether there is any soft refinement."""
        return self.soft_refinement > 0 and self.until > 0

    @property
    def in_sequence(self) -> bool:
        """Whether text of the regions stands behind the prompt, in models of joint attention."""
        return self.refines

    @property
    def idle(self) -> bool:
        return self.window.empty or not any(self.regions) or not (self.hard_binding or self.refines)

    def conflict(self, other: Control) -> str | None:
        return both_in_sequence(self, other) if self.in_sequence else None

    def _joint(self, sampling: Sampling) -> bool:
        return any(site.kind == "joint" for site in sampling.sites)

    def context(self, text: Text, sampling: Sampling) -> Text:
        if not self.refines or not self._joint(sampling):
            return text
        check_whole(self)
        return with_entities(text, sampling, self.regions, self.entity_tokens)

    def begin(self, sampling: Sampling) -> State:
        bound = self._bound(sampling)
        if not self.refines:
            return State(bound)
        if self._joint(sampling):
            return State(bound, entities=Entities.begin(sampling, self.regions, Where(kinds=("joint",))))
        where = replace(self.where, kinds=("cross",))
        prompts = RegionPrompts(self.regions, base_ratio=1 - self.soft_refinement, confine=False, where=where)
        return State(bound, prompts=(prompts, prompts.begin(sampling)))

    def _bound(self, sampling: Sampling) -> list[Bound]:
        _, height, width = sampling.latent_grid
        images, bound = sampling.images_per_prompt, []
        for p, regions in enumerate(per_prompt(self.regions, sampling.prompt_count)):
            for region in regions if self.hard_binding else ():
                region.check_aspect(height, width)
                mask = region.raster(height, width, "any") > 0
                rows, columns = box_of(mask)
                text = sampling.encode([region.phrase])
                pooled = None if text.pooled is None else text.pooled.repeat(images, 1)
                text = Text(text.positive.repeat(images, 1, 1), pooled=pooled)
                crop = Crop(slice(p * images, (p + 1) * images), rows, columns)
                bound.append(Bound(crop, mask[rows, columns].to(sampling.device), text))
        return bound

    def inputs(self, call: Call, state: State) -> Call:
        if call.branch != "cond" or call.step.progress >= self.until:
            return call
        if state.prompts is not None:
            control, kept = state.prompts
            return control.inputs(call, kept)
        if state.entities is None or self.soft_refinement == 1:
            return call
        groups = state.entities.mask(call, global_groups)
        return call if groups is None else beside(call, groups, 1 - self.soft_refinement)

    def mask(self, call: Call, state: State) -> TokenGroups | None:
        if state.entities is None:
            return None
        if call.branch != "cond" or call.step.progress >= self.until:
            return state.entities.mask(call, hidden_groups)
        return state.entities.mask(call, regional_groups)

    def guide(self, prediction: Prediction, step: Step, state: State) -> torch.Tensor:
        combined = prediction.combined
        if step.progress >= self.hard_binding:
            return combined
        for one in state.bound:
            part = prediction.again(one.text.positive, pooled=one.text.pooled, crop=one.crop)
            if prediction.uncond is not None:
                free = prediction.again(crop=one.crop, branch="uncond")
                seen = None if prediction.image is None else prediction.again(crop=one.crop, branch="image")
                part = prediction.guided(part, free, seen)
            combined = bind(combined, part, one.inside, one.crop)
        return combined
