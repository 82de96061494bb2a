"""Putting processors and hooks on a model, and taking them off; several runs may share one model."""

from __future__ import annotations

import copy
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from attnctrl.errors import ControlError
from attnctrl.processors.work import Work
from attnctrl.sites import Site

if TYPE_CHECKING:
    import torch

    from attnctrl.run import Run

# The runs that the current thread (or task) is inside of, outermost first.
RUNS: ContextVar[tuple[Run, ...]] = ContextVar("attnctrl_runs", default=())
_LOCK = threading.Lock()


class Installation:
    """Our processors and hooks on one model, there as long as any run, of any thread, uses the model."""

    def __init__(self, family: Any) -> None:
        self.family = family
        self.users = 0
        self.placed: list[tuple[Any, Any, Any]] = []
        self.sites: list[Site] = []
        self.foreign: dict[str, str] = {}
        self.handles: list[Any] = []

    def current(self) -> Run | None:
        """The innermost run of this thread that is in the middle of a sampling on this model."""
        for run in reversed(RUNS.get()):
            if run.installation is self and run.sampling is not None and not run.sampling.finished:
                return run
        return None

    def work(self, site: Site) -> Work | None:
        """What the processor of `site` has to do now; None for the stock attention."""
        run = self.current()
        return None if run is None else run.work(site)

    def place(self) -> None:
        for site, module in self.family.sites():
            stock = module.processor
            self.sites.append(site)
            if not self.family.reproducible(stock):
                self.foreign[site.name] = type(stock).__name__
                continue
            ours = self.family.processor(stock, site, self)
            module.set_processor(ours)
            self.placed.append((module, ours, stock))
        outer: torch.nn.Module = self.family.outer
        self.handles = [
            outer.register_forward_pre_hook(self._before, with_kwargs=True),
            outer.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self) -> None:
        for module, ours, stock in self.placed:
            # Someone who exchanged the processor inside the block wants theirs to stay.
            if module.processor is ours:
                module.set_processor(stock)
        for handle in self.handles:
            handle.remove()

    def _before(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        run = self.current()
        return None if run is None else run.before_denoiser(args, kwargs)

    def _after(self, module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        run = self.current()
        return None if run is None else run.after_denoiser(args, kwargs, output)


def acquire(family: Any) -> Installation:
    """The installation on the family's model, made if there is none yet; give it back with `release`."""
    with _LOCK:
        found = next((m.processor.owner for _, m in family.sites() if isinstance(m.processor, family.processor)), None)
        # A model compiled after the first run entered has another outer module, whose hooks would be missing.
        if found is not None and found.family.outer is not family.outer:
            raise ControlError(
                "the denoiser was exchanged or compiled inside a control block: do so before entering it."
            )
        if found is None:
            found = Installation(family)
            try:
                found.place()
            except BaseException:
                found.remove()
                raise
        found.users += 1
        return found


def release(installation: Installation) -> None:
    """Count one user less; the last one restores the model."""
    with _LOCK:
        installation.users -= 1
        if installation.users == 0:
            installation.remove()


def share(pipe: Any) -> Any:
    """A light copy of a pipeline for another thread: the same weights, its own scheduler and tokenizers.

    Schedulers keep a step index and fast tokenizers a truncation state, so two threads must not use one of either.
    Raises ControlError when `pipe` is under control at the moment.
    """
    if any(run.pipe is pipe for run in RUNS.get()):
        raise ControlError("share(pipe) was called inside a control block of that pipe: call it before entering.")
    light = copy.copy(pipe)
    light.scheduler = copy.deepcopy(pipe.scheduler)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if getattr(pipe, name, None) is not None:
            setattr(light, name, copy.deepcopy(getattr(pipe, name)))
    return light
