"""Small controls that only tests need, spies on a pipeline, and a picture of everything a run must put back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

import attnctrl as ac
from attnctrl.control import Descent, Loss
from attnctrl.sites import Call
from tests import tiny

REGIONS = (ac.Region("cat", box=(0.0, 0.0, 0.5, 1.0)), ac.Region("dog", box=(0.5, 0.0, 1.0, 1.0)))
EVERYWHERE = ac.Where(kinds=("cross", "self"))
COND, UNCOND = slice(1, 2), slice(0, 1)  # the rows of one picture's guided batch


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

    def context(self, text: Any, sampling: Any) -> Any:
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


def attention_layers(pipe: Any, kind: str | None = None) -> dict[str, Attention]:
    """The attention layers of the denoiser by name, all or those of one kind."""
    found = {n: m for n, m in pipe.unet.named_modules() if isinstance(m, Attention)}
    return {n: m for n, m in found.items() if kind is None or m.is_cross_attention == (kind == "cross")}


def snapshot(pipe: Any) -> dict[str, Any]:
    """Every object that a control block puts something in place of."""
    modules = dict(pipe.unet.named_modules())
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    found: dict[str, Any] = {f"{n}.processor": m.processor for n, m in attention_layers(pipe).items()}
    found |= {f"{n}.{h}[{k}]": v for n, m in modules.items() for h in hooks for k, v in getattr(m, h).items()}
    found |= {f"{n}.forward": m.__dict__["forward"] for n, m in modules.items() if "forward" in m.__dict__}
    found |= {f"{n}.compiled": m._compiled_call_impl for n, m in modules.items() if m._compiled_call_impl is not None}
    found |= {f"pipe.{n}": v for n, v in pipe.__dict__.items() if callable(v)}
    found |= {f"scheduler.{n}": v for n, v in pipe.scheduler.__dict__.items() if callable(v)}
    return found


def assert_restored(before: dict[str, Any], pipe: Any) -> None:
    """Each of the snapshot's objects is there and is the very same one, and none was added."""
    after = snapshot(pipe)
    assert after.keys() == before.keys()
    changed = [name for name in before if after[name] is not before[name]]
    assert changed == []


@dataclass
class Seen:
    """What a spy saw of the denoiser: per call its input, its text rows and its prediction."""

    samples: list[torch.Tensor] = field(default_factory=list)
    texts: list[torch.Tensor] = field(default_factory=list)
    predictions: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def watched(pipe: Any) -> Iterator[Seen]:
    """Spy on the denoiser. Enter it inside a control block: hooks run in the order in which they were put on."""
    seen = Seen()

    def before(module: Any, args: tuple, kwargs: dict) -> None:
        if torch.is_grad_enabled():  # a forward pass for a loss
            return
        seen.samples.append((args[0] if args else kwargs["sample"]).clone())
        seen.texts.append(kwargs["encoder_hidden_states"].clone())

    def after(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        if not torch.is_grad_enabled():
            seen.predictions.append(output[0].clone())

    handles = [
        pipe.unet.register_forward_pre_hook(before, with_kwargs=True),
        pipe.unet.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def spied_steps(pipe: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """What the scheduler's own step got and gave: (model output, sample, previous sample). Enter it outside."""
    steps = []
    stock = pipe.scheduler.step

    @functools.wraps(stock)
    def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = stock(model_output, timestep, sample, *args, **kwargs)
        steps.append((model_output.clone(), sample.clone(), result[0]))
        return result

    pipe.scheduler.step = step
    try:
        yield steps
    finally:
        del pipe.scheduler.step


def watch(pipe: Any, *controls: ac.Control, **kwargs: Any) -> Seen:
    """What the denoiser saw and said in a short run under controls."""
    with ac.control(pipe, *controls), watched(pipe) as seen:
        tiny.draw(pipe, **kwargs)
    return seen
