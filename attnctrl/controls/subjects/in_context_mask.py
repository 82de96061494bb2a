"""VFXMaster: a reference beside the picture in one context, with a mask that lets its look through, not its text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from attnctrl.control import Control, Where, param
from attnctrl.controls.subjects.rows import References
from attnctrl.errors import ControlError
from attnctrl.references import Subject
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Stream


@dataclass(frozen=True)
class State:
    """pictures: the rows to be drawn. sources: each reference's row, and the logarithm of its strength."""

    pictures: slice
    sources: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class InContextMask(Control):
    """The in-context attention mask of VFXMaster (arXiv 2510.25772), for references in rows of their own.

    What sees what: the prompt sees itself, its latents, and the reference's text and latents; the latents see the
    prompt, themselves and the reference's latents, not its text, lest what that names appear; a reference sees
    itself alone. The reference stands at the same positions, so that place i of the one lines up with place i of the
    other. The published sequence [prompt, text of the reference, latents, latents of the reference] under its
    mask is the same attention: each row of the batch holds its half, and rows of references are nobody's to change.
    In models with cross-attention latents see the reference's latents, and text only in their own row.
    The run draws references along: pictures of `subjects` by `DrawReferences`, whole, without their masks; or the last
    `references` prompts, of pictures or clips, whatever leads their rows. Departures: the paper's reference is free
    of noise (`DrawReferences(noise_scale=0)` makes it so, under the run's timestep), and its model was tuned for
    the mask; the learned tokens for unseen effects are left out. Each branch sees its own rows.
    Families: all.
    """

    paper: ClassVar[str] = "arXiv 2510.25772"
    fixes: ClassVar[str] = "an effect or a style of a reference, without what its prompt names"

    where: Where = field(default=Where(kinds=("self", "joint")), kw_only=True)
    branches: tuple[str, ...] = field(default=("cond", "uncond"), kw_only=True)
    subjects: Sequence[Subject] = ()
    references: int = param(0, "how many of the last prompts are references, beside pictures of subjects", 0, 64)

    @property
    def idle(self) -> bool:
        return self.window.empty or (self.references == 0 and all(s.strength == 0 for s in self.subjects))

    def begin(self, sampling: Sampling) -> State:
        if self.subjects and self.references:
            raise ControlError(
                f"{self.name} got subjects and {self.references} references: give one of the two, for the rows of a "
                "subject's pictures are references already."
            )
        if self.subjects:
            rows = References.of(sampling, self.subjects, self.name)
            found = tuple((rows.row(n), math.log(self.subjects[i].strength)) for i, n in rows.shown)
            return State(rows.pictures, found)
        if self.references >= sampling.prompt_count:
            raise ControlError(
                f"{self.name} has {self.references} references in a run of {sampling.prompt_count} prompts: call the "
                "pipeline with prompt=[picture, ..., reference, ...]."
            )
        first, images = sampling.prompt_count - self.references, sampling.images_per_prompt
        return State(slice(0, first * images), tuple((n * images, 0.0) for n in range(first, sampling.prompt_count)))

    def inputs(self, call: Call, state: State) -> Call:
        streams = []
        for row, bias in state.sources:
            streams.append(self._seen(call, state.pictures, row, call.keys.latent, bias))
            if call.keys.text.stop > call.keys.text.start:
                offset = torch.full((1, 1, call.query.shape[2], 1), float("-inf"), device=call.query.device)
                offset[:, :, call.queries.text] = bias
                streams.append(self._seen(call, state.pictures, row, call.keys.text, offset))
        return call.change(streams=(*call.streams, *streams))

    @staticmethod
    def _seen(call: Call, pictures: slice, row: int, part: slice, offset: float | torch.Tensor) -> Stream:
        """One part of a reference's keys in the softmax of the pictures, without what the model hides of it."""
        count = pictures.stop
        key, value = (t[row, None, :, part].expand(count, -1, -1, -1) for t in (call.key, call.value))
        mask = call.mask
        if mask is not None:
            mask = (mask if len(mask) == 1 else mask[row, None])[..., part]
            mask = mask if mask.shape[2] == 1 else None
        return Stream(key, value, 1.0, mask, offset=offset, rows=pictures)
