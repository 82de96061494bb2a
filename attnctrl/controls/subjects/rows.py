"""The references among the pictures of a run, and what the others get of them: what every such method shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attnctrl.control import param
from attnctrl.errors import ControlError
from attnctrl.references import Reference, Subject
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid, Stream

PLACINGS = ("bias", "gate", "replace")


def placing(default: str) -> Any:
    """The field that says how references reach the picture."""
    text = "references in one softmax with the picture's keys, gated beside them, or in their place"
    return param(default, text, choices=PLACINGS)


@dataclass
class References:
    """Which rows of a batch are pictures to be drawn and which are references.

    The prompts are those of the pictures, then one for each picture of each subject, in their order. scenes, images:
    prompts of pictures, and pictures of each. Of a reference the first row serves all pictures.
    """

    subjects: Sequence[Subject]
    scenes: int
    images: int
    _cells: dict[tuple[int, Grid], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, sampling: Sampling, subjects: Sequence[Subject], who: str, *, needed: bool = True) -> References:
        """needed: False where references are shown to nobody, and the run may have rows for them or not.

        Raises ControlError where the run has no rows for the references, or is of a video.
        """
        for subject in subjects:
            if not isinstance(subject, Subject):
                raise ControlError(f"{who}: {subject!r} is not a subject: give Subject(phrase, image).")
        count = sum(len(subject.references) for subject in subjects)
        last = (sampling.prompts or [])[-count:] if sampling.prompt_count > count else None
        if not needed and last != reference_prompts(subjects):
            count = 0
        elif sampling.prompt_count <= count:
            raise ControlError(
                f"{who} needs a row of the run for each of {count} references, after those of the pictures: call the "
                "pipeline with prompt=[picture, *reference_prompts(subjects)], or use SubjectsPipeline."
            )
        if subjects and sampling.latent_grid[0] > 1:
            raise ControlError(f"{who} takes references of pictures: it has no form for videos.")
        return cls(subjects, sampling.prompt_count - count, sampling.images_per_prompt)

    @property
    def pictures(self) -> slice:
        """The rows of the pictures to be drawn."""
        return slice(0, self.scenes * self.images)

    @property
    def all(self) -> list[tuple[int, Reference]]:
        """Every reference with the number of its subject, in the order of the rows."""
        return [(i, one) for i, subject in enumerate(self.subjects) for one in subject.references]

    @property
    def shown(self) -> list[tuple[int, int]]:
        """(number of the subject, number of the reference) of those whose subject has any strength."""
        return [(i, n) for n, (i, _) in enumerate(self.all) if self.subjects[i].strength > 0]

    def row(self, number: int) -> int:
        """The row of a reference."""
        return (self.scenes + number) * self.images

    def cells(self, number: int, grid: Grid, device: torch.device) -> torch.Tensor:
        """The latent tokens of a reference that show its subject: int64 (cells,)."""
        if (number, grid) not in self._cells:
            found = self.all[number][1].tokens(*grid[1:])
            self._cells[number, grid] = found.nonzero().flatten().to(device)
        return self._cells[number, grid]


def reference_prompts(subjects: Sequence[Subject]) -> list[str]:
    """The prompts of the rows of all references, which stand after those of the pictures."""
    return [subject.text for subject in subjects for _ in subject.references]


@dataclass(frozen=True)
class Look:
    """What some pictures see of one row: the tokens `index` of its latents, (cells,), which may repeat.

    who: (pictures, latent tokens), which queries look, bool, or in [0, 1] how much of it they get where looks are
    softmaxes of their own. rows: those of these pictures in the batch. bias: added to their logits, a number or
    (pictures, latent tokens). strength: of the subject.
    """

    row: int
    index: torch.Tensor
    who: torch.Tensor
    rows: slice
    bias: float | torch.Tensor = 0.0
    strength: float = 1.0


def looks_of_all(sources: Sequence[tuple[int, torch.Tensor, float]], pictures: slice, call: Call) -> list[Look]:
    """Every picture looks at every source, (row, index, strength), but at itself."""
    latent, found = call.queries.latent, []
    for row, index, strength in sources:
        who = torch.ones(pictures.stop, latent.stop - latent.start, dtype=torch.bool, device=call.query.device)
        if row < pictures.stop:
            who[row] = False
        found.append(Look(row, index, who, pictures, 0.0, strength))
    return found


def random_part(index: torch.Tensor, keep: float, draw: tuple[int, ...]) -> torch.Tensor:
    """Each of some tokens with probability `keep`; the same for the same `draw`."""
    if keep >= 1:
        return index
    generator = torch.Generator().manual_seed(hash(draw) % 2**63)
    return index[(torch.rand(len(index), generator=generator) < keep).to(index.device)]


def with_looks(call: Call, looks: Sequence[Look], how: str) -> Call:
    """The call whose pictures see these looks as well; every other row stays as it is.

    how: "bias": in one softmax with the layer's own keys, the bias and the logarithm of the strength added to the
    logits. "gate": softmaxes of their own, each with its strength as its weight beside the own one's 1, and all
    divided by their sum. "replace": likewise, but the own one's weight is 1 less the strongest's strength, at least 0.
    Looks without tokens or without anybody who looks are left out.
    """
    looks = [one for one in looks if len(one.index) and one.strength > 0 and bool(one.who.any())]
    if not looks:
        return call
    sees = []
    for one in looks:
        who = torch.zeros(len(one.who), 1, call.query.shape[2], 1, device=call.query.device)
        who[:, 0, call.queries.latent, 0] = one.who.to(who)
        sees.append(who)
    if how == "bias":
        streams = []
        for one, who in zip(looks, sees, strict=True):
            added = torch.zeros_like(who)
            added[:, 0, call.queries.latent, 0] += one.bias
            offset = torch.where(who > 0, added + math.log(one.strength), float("-inf"))
            streams.append(Stream(*_seen(call, one), 1.0, offset=offset, rows=one.rows))
        return call.change(streams=(*call.streams, *streams))
    total, most = torch.zeros(2, len(call.query), 1, call.query.shape[2], 1, device=call.query.device)
    for one, who in zip(looks, sees, strict=True):
        total[one.rows] += one.strength * who
        most[one.rows] = torch.maximum(most[one.rows], one.strength * who)
    own = torch.ones_like(total) if how == "gate" else (1 - most).clamp(min=0)
    rest, dtype = own / (own + total), call.value.dtype
    weighted = [
        Stream(*_seen(call, one), (one.strength * who / (own + total)[one.rows]).to(dtype), rows=one.rows)
        for one, who in zip(looks, sees, strict=True)
    ]
    return call.shared(rest.to(dtype), *weighted)


def _seen(call: Call, look: Look) -> tuple[torch.Tensor, torch.Tensor]:
    """The key and value that a look shows, for each picture that looks."""
    taken = look.index + call.keys.latent.start
    key, value = (t[look.row, None][:, :, taken].expand(len(look.who), -1, -1, -1) for t in (call.key, call.value))
    return key, value
