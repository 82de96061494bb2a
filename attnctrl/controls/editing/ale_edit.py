"""ALE-Edit: several objects edited at once, without their attributes leaking between them or into the background."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from attnctrl.control import Control, Where, param
from attnctrl.controls.editing.alignment import aligned
from attnctrl.controls.editing.sources import Sources
from attnctrl.edits import Edit
from attnctrl.errors import ControlError
from attnctrl.kernels import combine_masks
from attnctrl.prompt import PromptTokens
from attnctrl.regions import Region
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid, Stream


def restricted(joint: torch.Tensor, single: torch.Tensor, places: Sequence[int], words: int, end: int) -> torch.Tensor:
    """The embedding of one object alone at its places in the joint prompt (object-restricted embedding).

    joint: (tokens, channels) of the whole prompt, of which only the start token is kept. single: of the object's phrase
    alone, whose `words` tokens follow its start token. places: where they stand in the joint prompt. end: the joint
    prompt's end-of-text token, from which on the object's own end and padding stand; all else is 0.
    """
    alone = torch.zeros_like(joint)
    alone[0] = joint[0]
    alone[list(places)] = single[1 : 1 + words]
    alone[end:] = single[words + 1 : words + 1 + len(joint) - end]
    return alone


def spliced(joint: torch.Tensor, singles: Sequence[torch.Tensor], places: Sequence[Sequence[int]]) -> torch.Tensor:
    """The joint embedding, (tokens, channels), with each object's words as they are encoded alone."""
    base = joint.clone()
    for single, where in zip(singles, places, strict=True):
        base[list(where)] = single[1 : 1 + len(where)]
    return base


def passed_on(
    source: PromptTokens, target: PromptTokens, count: int, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> torch.Tensor:
    """The map (count, count) from the source's columns of attention to the target's, as in `alignment.aligned`.

    pairs: the places of each object's words in the source and in the target: word for word where they are equally
    many, else all of the object's attention in equal parts. Other words pass theirs on where both prompts have them.
    """
    passed, _ = aligned(source, target, count, "refine")
    for before, after in pairs:
        passed[list(before)] = 0
        passed[:, list(after)] = 0
        if len(before) == len(after):
            passed[list(before), list(after)] = 1
        else:
            passed[torch.tensor(before)[:, None], torch.tensor(after)] = 1 / len(after)
    return passed


@dataclass
class State:
    """embeddings: (objects + 1, pictures, tokens, channels), the last for the background. words, before: bool
    (pictures, objects, tokens), the objects' words in each picture's prompt and in the source's. passed: (pictures,
    tokens, tokens), the map of columns from the source. inside: by grid, bool (objects + 1, latent tokens), exactly
    one of them at each.
    """

    sources: Sources
    embeddings: torch.Tensor
    words: torch.Tensor
    before: torch.Tensor
    passed: torch.Tensor
    regions: list[Region]
    inside: dict[Grid, torch.Tensor] = field(default_factory=dict)

    def masks(self, grid: Grid) -> torch.Tensor:
        """See `inside`; latents of several objects belong to the background."""
        if grid not in self.inside:
            rows = torch.stack([r.raster(grid[1], grid[2], "nearest").flatten() > 0 for r in self.regions])
            lone = rows & (rows.sum(dim=0) == 1)
            self.inside[grid] = torch.cat([lone, ~lone.any(dim=0, keepdim=True)]).to(self.words.device)
        return self.inside[grid]


@dataclass(frozen=True)
class AleEdit(Control):
    """ALE-Edit (Mun et al., arXiv 2412.04715): object-restricted embeddings and region-guided cross-attention.

    The run draws the source and its edits together: prompt=[source, edit, ...]. In cross-attention a latent inside an
    object's mask gets the values of an embedding that knows this object alone, outside all of them those of the whole
    prompt (RGB-CAM); an object's words are not seen outside its mask. Until `self_until` the self-attention maps are
    the source's. Background blending is `SourceBlend`, which EditPipeline adds for masks; the paper's inversion is
    "virtual".
    Departures: until `cross_until` the cross-attention maps are the source's too, an object's words taking the place
    of those that they replace, as in Prompt-to-Prompt. The paper leaves it to the new words to find their object
    (`cross_until` 0), and where the latents still hold the old one they do not: on shapes-sd it loses half of the
    objects that change. The code hides an object's words outside its mask, where the paper's formula only blends; so
    does this, with -inf for its -100. The code splices the joint embedding wrongly for the second and third object;
    this does not.
    Families: UNets with CLIP's text encoders.
    """

    paper: ClassVar[str] = "arXiv 2412.04715"
    fixes: ClassVar[str] = "several edits at once that exchange their attributes"

    where: Where = field(default=Where(kinds=("cross", "self")), kw_only=True)
    branches: tuple[str, ...] = field(default=("cond", "uncond"), kw_only=True)
    edits: Sequence[Edit] = ()
    self_until: float = param(0.5, "part of the run with the source's self-attention", 0, 1)
    cross_until: float = param(0.8, "part of the run with the source's cross-attention maps", 0, 1)

    @property
    def idle(self) -> bool:
        return self.window.empty or not self.edits

    def begin(self, sampling: Sampling) -> State:
        sources = Sources.of(sampling, self.name)
        bare = next((edit for edit in self.edits if edit.mask is None), None)
        if bare is not None:
            raise ControlError(f'AleEdit needs a mask for every edit: "{bare.source}" has none.')
        gone = next((edit for edit in self.edits if not edit.target.strip()), None)
        if gone is not None:
            raise ControlError(
                f'AleEdit draws an object in its place, and the edit of "{gone.source}" has no words for it.'
            )
        regions = [Region(edit.target, mask=edit.mask) for edit in self.edits]
        for region in regions:
            region.check_aspect(*sampling.latent_grid[1:])
        singles = sampling.encode([edit.target for edit in self.edits]).positive
        whole = sampling.encode(list(sampling.prompts or [])).positive
        prompts, count = sampling.prompt_count, sampling.text_tokens
        before = [sampling.find(edit.source, 0, 0) for edit in self.edits]
        embeddings, words = [], torch.zeros(prompts, len(regions), count, dtype=torch.bool)
        passed = torch.eye(count).repeat(prompts, 1, 1)
        for p, tokens in enumerate(sampling.tokens):
            if p == 0:
                embeddings.append(whole[:1].expand(len(regions) + 1, -1, -1))
                continue
            if tokens[0].start is None:
                raise ControlError("AleEdit moves CLIP's embeddings, and this model's text encoder has no start token.")
            places = [sampling.find(edit.target, p, 0) for edit in self.edits]
            alone = [
                restricted(whole[p], single, where, len(where), tokens[0].end)
                for single, where in zip(singles, places, strict=True)
            ]
            embeddings.append(torch.stack([*alone, spliced(whole[p], list(singles), places)]))
            for i, where in enumerate(places):
                words[p, i, list(where)] = True
            pairs = list(zip(before, places, strict=True))
            passed[p] = passed_on(sampling.tokens[0][0], tokens[0], count, pairs)
        earlier = torch.zeros_like(words)
        for i, where in enumerate(before):
            earlier[1:, i, list(where)] = True
        stacked = torch.stack(embeddings, dim=1).to(sampling.device, sampling.dtype)
        images = sampling.images_per_prompt

        def rows(per_prompt: torch.Tensor) -> torch.Tensor:
            return per_prompt.to(sampling.device).repeat_interleave(images, dim=0)

        return State(
            sources, stacked.repeat_interleave(images, dim=1), rows(words), rows(earlier), rows(passed), regions
        )

    def inputs(self, call: Call, state: State) -> Call:
        if call.site.kind == "self":
            if call.step.progress >= self.self_until:
                return call
            return call.change(query=state.sources.of_source(call.query), key=state.sources.of_source(call.key))
        if call.branch != "cond":
            return call
        assert call.project is not None
        assert call.queries.grid is not None
        inside = state.masks(call.queries.grid)
        edits = state.sources.edits(call.query)
        values, words = [call.project(one)[1] for one in state.embeddings], state.words
        own = call.value
        if call.step.progress < self.cross_until:
            # Moving columns of a map is moving the values that they are multiplied by.
            call = call.change(query=state.sources.of_source(call.query), key=state.sources.of_source(call.key))
            values = [torch.einsum("bst,bhtd->bhsd", state.passed.to(v.dtype), v) for v in values]
            words = state.before
        # A latent outside an object does not see the object's words; the source sees everything.
        hidden = torch.einsum("bit,iq->bqt", words.float(), (~inside[:-1]).float()) > 0
        mask = combine_masks([m for m in (call.mask, ~hidden[:, None] | ~edits) if m is not None])
        weights = torch.where(edits, inside[:, None, None, :, None].to(own.dtype), 0)
        streams = [
            Stream(call.key, value, weight, mask) for value, weight in zip(values[:-1], weights[:-1], strict=True)
        ]
        base = torch.where(edits, weights[-1], 1)
        value = torch.where(edits, values[-1], own)
        return call.change(value=value, mask=mask).shared(base, *streams)
