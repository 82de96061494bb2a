"""`bench overhead`: what control costs in time, against the stock pipeline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from attnctrl.bench.draw import Settings, precision
from attnctrl.bench.methods import NONE, Spec
from attnctrl.bench.results import Results, Row
from attnctrl.bench.stats import Estimate, ratio_of_medians
from attnctrl.bench.tables import markdown
from attnctrl.bench.tasks import Task, given, make_tasks
from attnctrl.errors import ControlError
from attnctrl.run import Run, control

BATCHES = (1, 4)
OBJECTS = 2
REPETITIONS, QUICK_REPETITIONS = 15, 5
EMPTY, RECORD = "no controls", "recording 2 phrases"
FORWARD, BACKWARD = "denoiser forward", "denoiser forward + backward"


def default_methods() -> str:
    """A mask for either kind of text keys, and two losses read once in every step."""
    return "region-mask,eligen,loco{iterations=1;window=0..1},attend-excite{window=0..1}"


@dataclass
class Variant:
    """Something to time. run: does it once and returns how many losses were evaluated.

    seconds: of the wall clock, one per repetition; cpu_seconds: of the processor, which other processes hardly change.
    """

    name: str
    run: Callable[[], int]
    sampling: bool = True
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: int = 0

    def once(self) -> tuple[float, float]:
        """(wall, processor) seconds of one run."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.losses = self.run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On the CPU, one thread: of several, those that wait spin, and their time counts as work when others run."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sampling_variants(pipe: Any, tasks: Sequence[Task], specs: Sequence[Spec], settings: Settings) -> list[Variant]:
    """The stock pipeline and its controlled forms, up to the finished latents: decoding is the same for all."""

    def run(context: Callable[[], AbstractContextManager[Run | None]]) -> int:
        with precision(pipe.device, settings.dtype), context() as found:
            pipe(**{**settings.arguments(pipe, tasks), "output_type": "latent"})
        return len(found.losses) if found is not None else 0

    contexts: dict[str, Callable[[], AbstractContextManager[Run | None]]] = {
        NONE: nullcontext,
        EMPTY: partial(control, pipe),
        RECORD: partial(control, pipe, record=tasks[0].layout.phrases),
    }
    for spec in specs:
        if spec.parts:
            controls = spec.controls(given(tasks))
            contexts[spec.label] = partial(control, pipe, *controls, record=False)
    return [Variant(name, partial(run, context)) for name, context in contexts.items()]


def denoiser_variants(pipe: Any, tasks: Sequence[Task], settings: Settings) -> list[Variant]:
    """One whole pass of the denoiser on the conditional rows, and one with the gradient by the latents.

    That is the measure of a loss: a control's own pass ends after the last map that it reads.
    """
    model = pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
    seen: list[tuple[tuple, dict[str, Any]]] = []
    hook = model.register_forward_pre_hook(lambda module, a, k: seen.append((a, k)), with_kwargs=True)
    try:
        with precision(pipe.device, settings.dtype):
            # Guidance 1 is no guidance: the denoiser is given the conditional rows alone.
            pipe(**{**replace(settings, steps=2, guidance=1.0).arguments(pipe, tasks), "output_type": "latent"})
    finally:
        hook.remove()
    args, kwargs = seen[0]
    name = "positional" if args else next(k for k in ("sample", "hidden_states") if k in kwargs)
    sample = args[0] if args else kwargs[name]

    def run(backward: bool) -> int:
        leaf = sample.detach().clone().requires_grad_(backward)
        given = ((leaf, *args[1:]), kwargs) if args else ((), {**kwargs, name: leaf})
        with precision(pipe.device, settings.dtype), torch.set_grad_enabled(backward):
            predicted = model(*given[0], **given[1])[0]
            if backward:
                torch.autograd.grad(predicted.float().square().sum(), leaf)
        return 0

    return [
        Variant(FORWARD, partial(run, False), sampling=False),
        Variant(BACKWARD, partial(run, True), sampling=False),
    ]


def take_turns(variants: Sequence[Variant], repetitions: int, tick: Callable[[], Any]) -> None:
    """Time every variant once per repetition, each time starting with another one.

    A busy machine then slows all of them alike, where one after the other it would slow one.
    """
    for repetition in range(repetitions):
        first = repetition % len(variants)
        for variant in (*variants[first:], *variants[:first]):
            wall, cpu = variant.once()
            variant.seconds.append(wall)
            variant.cpu_seconds.append(cpu)
            tick()


def rows_of(variants: Sequence[Variant], batch: int, repetitions: int, on_cpu: bool) -> list[Row]:
    """One row per variant; losses also as multiples of the denoiser's passes, per evaluation.

    on_cpu: the model runs there, so that processor time is its cost; elsewhere it is the wall clock.
    """
    by_name = {v.name: v for v in variants}
    stock = by_name[NONE]

    def cost(variant: Variant) -> list[float]:
        return variant.cpu_seconds if on_cpu else variant.seconds

    rows = []
    for variant in variants:
        metrics: dict[str, Estimate] = {}
        if variant.sampling:
            metrics["ratio"] = ratio_of_medians(variant.seconds, stock.seconds)
            if on_cpu:
                metrics["ratio_cpu"] = ratio_of_medians(variant.cpu_seconds, stock.cpu_seconds)
        if variant.losses:
            own = [(a - b) / variant.losses for a, b in zip(cost(variant), cost(stock), strict=True)]
            metrics["loss_to_forward"] = ratio_of_medians(own, cost(by_name[FORWARD]))
            metrics["loss_to_forward_backward"] = ratio_of_medians(own, cost(by_name[BACKWARD]))
        seconds = statistics.median(variant.seconds) / batch
        more = {"batch": batch, "repetitions": repetitions, "losses": variant.losses}
        rows.append(Row(variant.name, OBJECTS, batch, metrics, seconds, more=more))
    return rows


def measure(pipe: Any, specs: Sequence[Spec], repetitions: int, settings: Settings, results: Results) -> None:
    """Add the rows of every batch size."""
    for batch in BATCHES:
        # One prompt throughout, so that the recorded phrases stand in all.
        tasks = make_tasks(OBJECTS, 1, "test", settings.seed) * batch
        variants = []
        for variant in (
            *sampling_variants(pipe, tasks, specs, settings),
            *denoiser_variants(pipe, tasks, settings),
        ):
            try:
                variant.once()
                variants.append(variant)
            except ControlError as error:
                results.add(Row(variant.name, OBJECTS, 0, error=str(error), more={"batch": batch}))
        with tqdm(total=repetitions * len(variants), desc=f"batch {batch}", unit="run") as bar:
            take_turns(variants, repetitions, bar.update)
        for row in rows_of(variants, batch, repetitions, pipe.device.type == "cpu"):
            results.add(row)


def table(results: Results) -> str:
    """One line per variant and batch size. Errors follow below."""
    columns = {
        "ratio": "x stock",
        "ratio_cpu": "x stock, CPU time",
        "loss_to_forward": "loss / forward",
        "loss_to_forward_backward": "loss / (forward + backward)",
    }
    head = ["what", "batch", "ms/image", "losses", *columns.values()]
    body = []
    for row in results.rows:
        if row.error is None and row.seconds_per_image is not None:
            milliseconds, losses = f"{1000 * row.seconds_per_image:.1f}", str(row.more["losses"] or "-")
            shown = [str(row.metrics.get(name, "-")) for name in columns]
            body.append([row.method, str(row.more["batch"]), milliseconds, losses, *shown])
    errors = [f"- {r.method}, batch {r.more['batch']}: {r.error}" for r in results.rows if r.error is not None]
    return "\n".join([markdown(head, body), *([""] if errors else []), *errors])
