"""Regional prompting for joint attention: regions that see nothing but their own text and latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
from attnctrl.errors import ControlError
from attnctrl.kernels.groups import TokenGroups
from attnctrl.layout import Regions, per_prompt
from attnctrl.regions import Region
from attnctrl.sampling import Sampling
from attnctrl.sites import Call
from attnctrl.text import Text

WHOLE = (0.0, 0.0, 1.0, 1.0)


def with_background(
    regions: Regions, prompts: list[str] | None, count: int, background: str | Sequence[str]
) -> Regions:
    """One list per prompt: its regions behind one of the whole picture, whose text is `background`, else the prompt.

    prompts: count of them, None where the pipeline got embeddings only. A prompt without regions stays without.
    Raises ControlError where there is no text to take, or not one for each prompt.
    """
    lists = per_prompt(regions, count)
    texts = [background] * count if isinstance(background, str) else list(background)
    if len(texts) != count:
        raise ControlError(
            f"RegionalFlux has {len(texts)} backgrounds for {count} prompts: give one text for all, or one per prompt."
        )
    if prompts is None and not all(texts):
        raise ControlError(
            "RegionalFlux reads the prompt where it gets no background, but the pipeline was given prompt_embeds: "
            "give background=..., or name the prompt with control(pipe, ..., prompt=...)."
        )
    texts = [text or prompt for text, prompt in zip(texts, prompts or texts, strict=True)]
    return [
        [Region("background", box=WHOLE, prompt=text), *rs] if rs else [] for rs, text in zip(lists, texts, strict=True)
    ]


def _parts(places: Places) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Membership of the isolated parts, text and latents, bool (batch, tokens, parts) each, the background first.

    And bool (batch, tokens): the latents of prompts with regions.
    """
    inside = places.inside.clone()
    controlled = places.latents & places.entities.any(dim=(1, 2))[:, None]
    inside[:, 0] = controlled & ~inside[:, 1:].any(dim=1)
    return places.entities.transpose(1, 2), inside.transpose(1, 2), controlled


def strict_groups(places: Places) -> TokenGroups:
    """A region's text and latents see each other and nothing else; so do the background's, where no region is.

    The prompt sees itself and all latents, and of these none sees it but those of prompts without regions. Latents of
    several regions belong to all of them. The first region is the background's.
    """
    text, latents, controlled = _parts(places)
    own = text | latents
    free = places.prompt | (places.latents & ~controlled)
    seen = places.prompt | places.latents
    return TokenGroups.from_members(
        torch.cat([free[..., None], own], dim=-1), torch.cat([seen[..., None], own], dim=-1)
    )


def open_groups(places: Places) -> TokenGroups:
    """For layers between the masked ones: the regions' texts and all latents see each other; the prompt as above."""
    text, _, controlled = _parts(places)
    both = text.any(dim=-1) | controlled
    free = places.prompt | (places.latents & ~controlled)
    seen = places.prompt | places.latents
    return TokenGroups.from_members(torch.stack([free, both], dim=-1), torch.stack([seen, both], dim=-1))


def base_groups(places: Places) -> TokenGroups:
    """What the prompt says: the latents of prompts with regions see it and all latents."""
    _, _, controlled = _parts(places)
    seen = places.prompt | places.latents
    return TokenGroups.from_members(controlled[..., None], seen[..., None])


@dataclass(frozen=True)
class RegionalFlux(Control):
    """Training-free Regional Prompting for Diffusion Transformers (Chen et al., arXiv 2411.02395).

    In the first part of the run every region has a text of its own in the joint sequence, and its latents see that
    text and each other alone; the latents of no region form the background, with a text of its own too. What the
    stock model would make of them, seeing the prompt and all latents, is mixed in by `base_ratio`:
    (1 - base_ratio) * regional + base_ratio * base. Afterwards the model runs as it is. A region's text is
    `Region.prompt`, else its phrase. A latent token belongs to a region when any part of it does; where regions
    overlap it sees all of them. The official code is for 5 to 10 of 24 steps; on the shapes world 0.3
    of them is best, and isolation held for longer cuts the picture into pieces.
    Departures: the latents are one stream in all layers, where the official code splits them in two from the first
    single block on; of each text `entity_tokens` tokens are kept, where it keeps 512; `every` counts all layers, where
    it has a number for double blocks and one for single ones. The unconditional branch is the stock one.
    Families: joint attention. Layers of latents alone, as Stable Diffusion 3.5 and Z-Image have, are not isolated.
    """

    paper: ClassVar[str] = "arXiv 2411.02395"
    fixes: ClassVar[str] = "objects in the wrong place, attributes leaking between objects, on transformers"
    in_sequence: ClassVar[bool] = True

    regions: Regions = ()
    background: str | Sequence[str] = param("", 'text of what no region covers, or one per prompt; "": the prompt')
    until: float = param(0.3, "share of the run in which regions are isolated", 0, 1)
    base_ratio: float = param(0.1, "share of the stock attention; smaller is stricter, 1 is the stock picture", 0, 1)
    every: int = param(1, "isolate in every n-th layer; in those between regions see each other", 1, 64)
    entity_tokens: int = param(64, "text tokens kept of each region", 1, 512)
    branches: tuple[str, ...] = field(default=("cond", "uncond"), kw_only=True)
    where: Where = field(default=Where(kinds=("joint",)), kw_only=True)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.until == 0 or self.base_ratio == 1 or not any(self.regions)

    def conflict(self, other: Control) -> str | None:
        return both_in_sequence(self, other)

    def _all(self, sampling: Sampling) -> Regions:
        return with_background(self.regions, sampling.prompts, sampling.prompt_count, self.background)

    def context(self, text: Text, sampling: Sampling) -> Text:
        check_whole(self)
        return with_entities(text, sampling, self._all(sampling), self.entity_tokens)

    def begin(self, sampling: Sampling) -> Any:
        return Entities.begin(sampling, self._all(sampling), self.where)

    def _strict(self, call: Call) -> bool:
        return call.branch == "cond" and call.step.progress < self.until

    def inputs(self, call: Call, state: Entities) -> Call:
        groups = state.mask(call, base_groups) if self._strict(call) and self.base_ratio else None
        return call if groups is None else beside(call, groups, self.base_ratio)

    def mask(self, call: Call, state: Entities) -> TokenGroups | None:
        if not self._strict(call):
            return state.mask(call, hidden_groups)
        if call.site.order % self.every:
            return state.mask(call, open_groups)
        return state.mask(call, strict_groups)
