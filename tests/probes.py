"""Small controls that only tests need, one for each point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

import attnctrl as ac
from attnctrl.control import Descent, Loss
from attnctrl.sites import Call

REGIONS = (ac.Region("cat", box=(0.0, 0.0, 0.5, 1.0)), ac.Region("dog", box=(0.5, 0.0, 1.0, 1.0)))


EVERYWHERE = ac.Where(kinds=("cross", "self"))


@dataclass(frozen=True)
class Mask(ac.Control):
    """A mask made from the call: `make(call)`."""

    make: Callable[[Call], torch.Tensor | None] = field(default=lambda call: None)

    def mask(self, call: Call, state: Any) -> torch.Tensor | None:
        return self.make(call)


def all_visible(call: Call) -> torch.Tensor:
    """A mask that forbids nothing. Of the call only the layouts are read: torch.compile asks without tensors."""
    return torch.ones(1, 1, call.queries.text.stop, call.keys.text.stop, dtype=torch.bool)


def only_first_key(call: Call) -> torch.Tensor:
    """A mask that leaves every query one key."""
    mask = ~all_visible(call)
    mask[..., 0] = True
    return mask


@dataclass(frozen=True)
class Token(ac.Control):
    """Pull the attention to text position `position`, or push it away: value = sign * mean map of that column."""

    position: int = 2
    scale: float = 1.0
    sign: float = 1.0
    iterations: int = 1

    def descent(self, step: Any) -> Descent:
        return Descent(self.scale, self.iterations)

    def loss(self, maps: Any, step: Any, state: Any) -> Loss:
        columns = [m.probs[..., self.position].mean(dim=-1) for m in maps.cross.values()]
        return Loss(self.sign * torch.stack(columns).mean(dim=0))


@dataclass(frozen=True)
class Attend(ac.Control):
    """Replace the attention by the mean of the values."""

    def attend(self, call: Call, state: Any) -> torch.Tensor:
        return call.value.mean(dim=2, keepdim=True).expand_as(call.query)


@dataclass(frozen=True)
class Inputs(ac.Control):
    edit: Callable[[Call], Call] = field(default=lambda call: call)

    def inputs(self, call: Call, state: Any) -> Call:
        return self.edit(call)


@dataclass(frozen=True)
class Scores(ac.Control):
    edit: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda scores: scores)
    shapes: list = field(default_factory=list, compare=False)

    def scores(self, scores: torch.Tensor, call: Call, state: Any) -> torch.Tensor:
        self.shapes.append((call.site.kind, tuple(scores.shape), scores.dtype, call.query.shape, call.key.shape))
        return self.edit(scores)


@dataclass(frozen=True)
class Probs(ac.Control):
    edit: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda probs: probs)
    sums: list = field(default_factory=list, compare=False)

    def probs(self, probs: torch.Tensor, call: Call, state: Any) -> torch.Tensor:
        self.sums.append(probs.sum(dim=-1))
        return self.edit(probs)


@dataclass(frozen=True)
class Output(ac.Control):
    edit: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda output: output)

    def output(self, output: torch.Tensor, call: Call, state: Any) -> torch.Tensor:
        assert output.shape == call.query.shape
        return self.edit(output)


@dataclass(frozen=True)
class Context(ac.Control):
    by: float = 1.0
    got: list = field(default_factory=list, compare=False)

    def context(self, text: Any, sampling: Any) -> Any:
        self.got.append(text)
        return text.change(positive=text.positive + self.by)


@dataclass(frozen=True)
class Noise(ac.Control):
    edit: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda noise: noise)
    got: list = field(default_factory=list, compare=False)

    def noise(self, noise: torch.Tensor, sampling: Any, state: Any) -> torch.Tensor:
        self.got.append(noise)
        return self.edit(noise)


@dataclass(frozen=True)
class Latents(ac.Control):
    got: list = field(default_factory=list, compare=False)

    def latents(self, latents: torch.Tensor, step: Any, state: Any) -> torch.Tensor:
        self.got.append((step.index, latents))
        return torch.full_like(latents, float(step.index))


@dataclass(frozen=True)
class Guide(ac.Control):
    make: Callable[[Any], torch.Tensor] = field(default=lambda prediction: prediction.combined)
    got: list = field(default_factory=list, compare=False)

    def guide(self, prediction: Any, step: Any, state: Any) -> torch.Tensor:
        self.got.append(prediction)
        return self.make(prediction)


@dataclass(frozen=True)
class Nudge(ac.Control):
    """Add `by` to the latents after each step."""

    by: float = 0.1

    def latents(self, latents: torch.Tensor, step: Any, state: Any) -> torch.Tensor:
        return latents + self.by


class Foreign:
    """A processor of somebody else, as an IP-Adapter's: it does more than the stock one."""

    def __init__(self) -> None:
        self.stock = AttnProcessor2_0()

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 0.5 * self.stock(attn, hidden_states, *args, **kwargs)
