"""Prompt-to-Prompt: an edited prompt is drawn with the attention of the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from attnctrl.control import Control, Where, param
from attnctrl.controls.editing.alignment import aligned, words
from attnctrl.controls.editing.sources import Sources
from attnctrl.errors import ControlError
from attnctrl.kernels import probabilities
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid, Site, Step, Stream

BLEND_WHERE = Where(kinds=("cross",), near=1 / 16)


def blend_mask(maps: torch.Tensor, height: int, width: int, threshold: float) -> torch.Tensor:
    """Where a picture may differ from its source, bool (height, width), from a map (h, w) of the words in question.

    3x3 maximum, nearest neighbour to the latents' size, over the largest value, above `threshold`.
    """
    pooled = F.max_pool2d(maps[None, None], 3, stride=1, padding=1)
    grown = F.interpolate(pooled, size=(height, width), mode="nearest")[0, 0]
    return grown / grown.max().clamp_min(1e-12) > threshold


@dataclass
class State:
    """passed: (pictures, tokens, tokens) the map of columns; taken: (pictures, tokens), 1 where it is used; factors:
    (pictures, tokens) the weights of words; shared: names of the sites that take the source's self-attention; blended:
    (pictures, tokens) bool, the words whose maps bound the edit, in the sites `seen`; maps: (pictures, latent tokens)
    by step and site.
    """

    sources: Sources
    passed: torch.Tensor
    taken: torch.Tensor
    factors: torch.Tensor
    shared: frozenset[str]
    blended: torch.Tensor
    seen: frozenset[str]
    maps: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    grid: Grid | None = None


@dataclass(frozen=True)
class PromptToPrompt(Control):
    """Prompt-to-Prompt (Hertz et al., arXiv 2208.01626): replace, refine, reweight, and local blend.

    The run draws the source and its edits together: prompt=[source, edit, ...]. Until `cross_until` of the run the
    edits attend to their words as the source attends to its own, words matched by `edit`; until `self_until` their
    self-attention on coarse grids is the source's. `reweight` multiplies the attention to words of the edited prompt
    in every step (not renormalised, as published). With `blend`, latents outside the words' maps are the source's.
    A column of attention is only ever multiplied by its value, so moving columns from the source to the edit is moving
    values between tokens: out = A_source (M V), and no map is materialised (eq. 4 to 6 of the paper, rewritten).
    Departures: the paper's `blend` reads the 16x16 maps of Stable Diffusion by list index; here it is the sites of
    about 1/16 of the latents' tokens. `edit` "auto" replaces where both prompts have equally many words. Families:
    those with separate text keys.
    """

    paper: ClassVar[str] = "arXiv 2208.01626"
    fixes: ClassVar[str] = "an edit of the prompt that changes the whole picture"

    where: Where = field(default=Where(kinds=("cross", "self")), kw_only=True)
    edit: str = param("auto", "how words are matched", choices=("auto", "replace", "refine"))
    cross_until: float = param(0.8, "part of the run with the source's cross-attention", 0, 1)
    self_until: float = param(0.4, "part of the run with the source's self-attention", 0, 1)
    self_share: float = param(0.25, "largest grid for that, as a share of the latents' tokens", 0, 1)
    reweight: Mapping[str, float] = field(
        default_factory=dict, kw_only=True, metadata={"help": "factors for the attention to words of the edited prompt"}
    )
    blend: Sequence[str] = param((), "words outside whose maps the source is kept")
    threshold: float = param(0.3, "of the blend's map, relative to its largest value", 0, 1)
    blend_from: float = param(0.2, "part of the run before the blend begins", 0, 1)

    @property
    def idle(self) -> bool:
        nothing = not self.cross_until and not self.self_until and not self.reweight and not self.blend
        return self.window.empty or nothing

    def begin(self, sampling: Sampling) -> State:
        sources = Sources.of(sampling, self.name)
        if not any(site.kind == "cross" for site in sampling.sites):
            raise ControlError(
                "PromptToPrompt passes cross-attention on, and this model has joint attention: use MutualSelfAttention."
            )
        count, prompts = sampling.text_tokens, sampling.prompt_count
        passed = torch.eye(count).repeat(prompts, 1, 1)
        taken, factors = torch.zeros(prompts, count), torch.ones(prompts, count)
        blended = torch.zeros(prompts, count, dtype=torch.bool)
        first = sampling.tokens[0][0]
        for p in range(1, prompts):
            other = sampling.tokens[p][0]
            equal = len(words(first.prompt)) == len(words(other.prompt))
            edit = ("replace" if equal else "refine") if self.edit == "auto" else self.edit
            passed[p], defined = aligned(first, other, count, edit)
            taken[p] = defined.float()
            for phrase, factor in self.reweight.items():
                factors[p, list(sampling.find(phrase, p))] = factor
        for phrase in self.blend:
            having = [p for p in range(prompts) if any(t.occurrences(phrase) for t in sampling.tokens[p])]
            for p in having or [0]:  # sampling.find raises where no prompt has it
                blended[p, list(sampling.find(phrase, p))] = True
        if self.blend and not blended.any(dim=1).all():
            bare = int((~blended.any(dim=1)).nonzero()[0])
            raise ControlError(
                f'PromptToPrompt: blend names no word of the prompt "{sampling.tokens[bare][0].prompt}": name what '
                "changes in each prompt."
            )

        def rows(per_prompt: torch.Tensor) -> torch.Tensor:
            return per_prompt.to(sampling.device).repeat_interleave(sampling.images_per_prompt, dim=0)

        share = Where(kinds=("self",), max_tokens=round(self.self_share * _tokens(sampling.latent_grid)))
        seen = BLEND_WHERE.select(sampling.sites, sampling.latent_grid) if self.blend else []
        return State(
            sources,
            rows(passed),
            rows(taken),
            rows(factors),
            _names(share.select(sampling.sites, sampling.latent_grid)),
            rows(blended),
            _names(seen),
        )

    def inputs(self, call: Call, state: State) -> Call:
        if call.site.kind == "self":
            if call.step.progress >= self.self_until or call.site.name not in state.shared:
                return call
            return call.change(query=state.sources.of_source(call.query), key=state.sources.of_source(call.key))
        if call.site.name in state.seen:
            state.grid = call.queries.grid
            attention = probabilities(call.query, call.key, call.mask, call.scale).mean(dim=1)
            state.maps[call.step.index, call.site.name] = torch.einsum(
                "bqt,bt->bq", attention, state.blended.to(attention.dtype)
            )
        value = call.value * state.factors[:, None, :, None].to(call.value.dtype)
        if call.step.progress >= self.cross_until:
            return call.change(value=value)
        query, key = state.sources.of_source(call.query), state.sources.of_source(call.key)
        edits = state.sources.edits(value)
        taken = state.taken[:, None, :, None].to(value.dtype)
        moved = torch.einsum("bst,bhtd->bhsd", state.passed.to(value.dtype), value * taken)
        if bool(state.taken[state.sources.images :].all()):
            return call.change(query=query, key=key, value=torch.where(edits, moved, value))
        stream = Stream(key, torch.where(edits, moved, 0), 1.0, call.mask, query)
        return call.change(value=torch.where(edits, value * (1 - taken), value), streams=(*call.streams, stream))

    def latents(self, latents: torch.Tensor, step: Step, state: State) -> torch.Tensor:
        if not state.seen or step.progress < self.blend_from:
            return latents
        assert state.grid is not None
        maps = torch.stack(list(state.maps.values())).sum(dim=0).unflatten(1, state.grid[1:])
        height, width = latents.shape[-2:]
        own = torch.stack([blend_mask(m, height, width, self.threshold) for m in maps])[:, None]
        inside = own | state.sources.of_source(own)
        return torch.where(inside, latents, state.sources.of_source(latents))


def _tokens(grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2]


def _names(sites: list[Site]) -> frozenset[str]:
    return frozenset(site.name for site in sites)
