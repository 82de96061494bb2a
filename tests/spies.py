"""A picture of everything a run must put back, and spies on what the denoiser and the scheduler see."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

import attnctrl as ac
from tests import tiny

COND, UNCOND = slice(1, 2), slice(0, 1)  # the rows of one picture's guided batch


def attention_layers(pipe: Any, kind: str | None = None) -> dict[str, Attention]:
    """The attention layers of the denoiser by name, all or those of one kind."""
    found = {n: m for n, m in pipe.unet.named_modules() if isinstance(m, Attention)}
    return {n: m for n, m in found.items() if kind is None or m.is_cross_attention == (kind == "cross")}


def snapshot(pipe: Any) -> dict[str, Any]:
    """Every object that a control block puts something in place of."""
    parts = {n: getattr(pipe, n, None) for n in ("unet", "transformer", "transformer_2")}
    modules = {f"{n}.{path}": m for n, part in parts.items() if part is not None for path, m in part.named_modules()}
    checkpoint = "_gradient_checkpointing_func"
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    found: dict[str, Any] = {f"{n}.processor": m.processor for n, m in modules.items() if hasattr(m, "processor")}
    found |= {f"{n}.{h}[{k}]": v for n, m in modules.items() for h in hooks for k, v in getattr(m, h).items()}
    found |= {f"{n}.forward": m.__dict__["forward"] for n, m in modules.items() if "forward" in m.__dict__}
    found |= {f"{n}.compiled": m._compiled_call_impl for n, m in modules.items() if m._compiled_call_impl is not None}
    found |= {f"{n}.checkpoint": m.__dict__[checkpoint] for n, m in modules.items() if checkpoint in m.__dict__}
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


class Stop(Exception):
    """Raised by a callback in the middle of the loop."""


def stop_at(step: int) -> Any:
    def callback(pipe: Any, index: int, timestep: Any, values: dict) -> dict:
        if index == step:
            raise Stop
        return values

    return callback
