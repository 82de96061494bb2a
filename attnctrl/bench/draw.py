"""Drawing a batch of tasks with a pipeline under controls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from attnctrl.bench.methods import Spec
from attnctrl.bench.tasks import Task, given
from attnctrl.models import call_arguments
from attnctrl.run import control
from attnctrl.shapes.layouts import Split

DTYPES = {"float32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn: steps of the scheduler, guidance scale, pictures per pipeline call.

    guidance: as in `attnctrl.models.call_arguments`. call: further arguments of the pipeline's call.
    dtype: "float32", or "bf16" for autocast around the whole pipeline, losses and their gradients included.
    """

    steps: int = 25
    guidance: float = 3.5
    batch: int = 8
    dtype: str = "float32"
    seed: int = 0
    split: Split = "test"
    call: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """What results depend on; `call` only where it says something."""
        return {k: v for k, v in asdict(self).items() if k != "dtype" and v != {}}

    def arguments(self, pipe: Any, tasks: Sequence[Task]) -> dict[str, Any]:
        """What `pipe` is called with for these tasks. Raises ControlError for a `call` that it does not take."""
        own = {
            "num_inference_steps": self.steps,
            # Drawn on the CPU and moved by the pipeline: the same noise on every device.
            "generator": [torch.Generator().manual_seed(t.seed) for t in tasks],
        }
        return call_arguments(pipe, [t.prompt for t in tasks], self.guidance, {**own, **self.call})


@contextmanager
def precision(device: torch.device, dtype: str) -> Iterator[None]:
    """Autocast to `dtype` of `Settings`; nothing for float32."""
    with ExitStack() as stack:
        if DTYPES[dtype] is not None:
            stack.enter_context(torch.autocast(device.type, DTYPES[dtype]))
        yield


@dataclass(frozen=True)
class Drawn:
    """pictures: (height, width, 3) float in 0..1 each. seconds_per_image: median over the pipeline calls.

    losses: one per picture, the mean over the steps in which the method descended a loss; empty where none did.
    """

    pictures: list[np.ndarray]
    seconds_per_image: float
    losses: list[float]


def draw(
    pipe: Any, tasks: Sequence[Task], spec: Spec, settings: Settings, tick: Callable[[int], None] = lambda n: None
) -> Drawn:
    """Draw every task with one method, `settings.batch` prompts with their own regions per pipeline call.

    Each picture has a generator of its own, so that it does not depend on its batch. tick: told how many pictures
    were drawn, after each call. Raises ControlError when the method cannot work.
    """
    pictures: list[np.ndarray] = []
    losses: list[float] = []
    seconds: list[tuple[int, float]] = []
    for first in range(0, len(tasks), settings.batch):
        chosen = tasks[first : first + settings.batch]
        start = time.perf_counter()
        with ExitStack() as stack:
            stack.enter_context(precision(pipe.device, settings.dtype))
            controls = spec.controls(given(chosen))
            run = stack.enter_context(control(pipe, *controls, record=False)) if controls else None
            made = pipe(**{**settings.arguments(pipe, chosen), "output_type": "np"}).images
        seconds.append((len(chosen), time.perf_counter() - start))
        pictures.extend(made)
        if run is not None:
            each = [one.values for one in run.losses if one.iteration == 0]
            losses.extend(statistics.fmean(of_one) for of_one in zip(*each, strict=True))
        tick(len(chosen))
    # A short last batch costs more per picture: it counts only where there is no other.
    whole = [s / n for n, s in seconds if n == settings.batch] or [s / n for n, s in seconds]
    return Drawn(pictures, statistics.median(whole), losses)
