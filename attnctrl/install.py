"""Putting processors and hooks on a model, and taking them off; several runs may share one model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from contextvars import ContextVar, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

from attnctrl.compiled import compiled_in_place, enclose
from attnctrl.errors import ControlError
from attnctrl.processors.work import Work
from attnctrl.sites import Site

if TYPE_CHECKING:
    import torch

    from attnctrl.run import Run

# The runs that the current thread (or task) is inside of, outermost first.
RUNS: ContextVar[tuple[Run, ...]] = ContextVar("attnctrl_runs", default=())
_LOCK = threading.Lock()
CHECKPOINT = "_gradient_checkpointing_func"


class Installation:
    """Our processors and hooks on the denoisers of one pipeline, there as long as any run, of any thread, uses them."""

    def __init__(self, family: Any) -> None:
        self.family = family
        self.users = 0
        self.placed: list[tuple[Any, Any, Any]] = []
        self.sites: list[Site] = []
        self.foreign: dict[str, str] = {}
        self.undo: list[Callable[[], None]] = []
        self.frozen: list[torch.nn.Parameter] = []

    def current(self) -> Run | None:
        """The run of this thread that is in the middle of a sampling on this model; an idle one has no installation."""
        return latest(run for run in RUNS.get() if run.family.denoisers == self.family.denoisers)

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
            ours = self.family.stand_in(stock, site, self)
            put_processor(module, ours)
            self.placed.append((module, ours, stock))
        for denoiser in self.family.denoisers:
            if compiled_in_place(denoiser):
                self.undo.append(enclose(denoiser, partial(self._around, denoiser)))
            else:
                self.undo.append(denoiser.register_forward_pre_hook(self._before, with_kwargs=True).remove)
                self.undo.append(denoiser.register_forward_hook(self._after, with_kwargs=True).remove)
        for block, around in self.family.compiled_blocks():
            self.undo.append(enclose(block, around))

    def freeze(self) -> None:
        """Stop tracking gradients by the weights, whose saved activations would cost a loss most of its memory."""
        loose = [p for model in self.family.models for p in model.parameters() if p.requires_grad]
        for parameter in loose:
            parameter.requires_grad_(False)
        self.frozen += loose

    def carry_context(self) -> None:
        """Have gradient checkpointing recompute layers under the context variables of their forward pass.

        On a GPU they are recomputed in autograd's own threads, where `RUNS` is empty.
        """
        with _LOCK:
            for module in (m for model in self.family.models for m in model.modules()):
                stock = getattr(module, CHECKPOINT, None)
                if stock is not None and not hasattr(stock, "attnctrl_stock"):
                    setattr(module, CHECKPOINT, _carrying(stock))
                    self.undo.append(partial(_uncarry, module))

    def remove(self) -> None:
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        for module, ours, stock in self.placed:
            # Someone who exchanged the processor inside the block wants theirs to stay.
            if module.processor is ours:
                put_processor(module, stock)
        for undo in self.undo:
            undo()

    def _before(self, denoiser: Any, args: tuple, *rest: Any) -> tuple[tuple, dict] | None:
        run = self.current()
        return None if run is None else run.before_denoiser(denoiser, args, *rest)

    def _after(self, denoiser: Any, args: tuple, *rest: Any) -> None:
        run = self.current()
        # Outside a run, without kwargs too: torch forgets that we asked for them when another thread removes us.
        if run is not None:
            kwargs, output = rest
            run.after_denoiser(args, kwargs, output)

    def _around(self, denoiser: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        args, kwargs = self._before(denoiser, args, kwargs) or (args, kwargs)
        output = call(*args, **kwargs)
        self._after(denoiser, args, kwargs, output)
        return output


def put_processor(module: Any, processor: Any) -> None:
    # Mochi's attention has no `set_processor`.
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor


def _carrying(checkpoint: Callable) -> Callable:
    def carrying(layer: Callable, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(copy_context().run, layer), *args, **kwargs)

    carrying.attnctrl_stock = checkpoint  # type: ignore[attr-defined]
    return carrying


def _uncarry(module: Any) -> None:
    # Checkpointing may have been switched on again inside the block, with a function of its own.
    ours = getattr(module, CHECKPOINT)
    setattr(module, CHECKPOINT, getattr(ours, "attnctrl_stock", ours))


def latest(runs: Iterable[Run]) -> Run | None:
    """The one of `runs` that began a sampling last and has not finished it: the one that is sampling now."""
    busy = [run for run in runs if run.sampling is not None and not run.sampling.finished]
    return max(busy, key=lambda run: run.sampling.begun if run.sampling else -1, default=None)


def acquire(family: Any, *, frozen: bool = False) -> Installation:
    """The installation on the family's model, made if there is none yet; give it back with `release`.

    frozen: gradients by the latents will be taken, so the weights need none until the last user has gone.
    """
    with _LOCK:
        owners = (getattr(m.processor, "owner", None) for _, m in family.sites())
        found = next((owner for owner in owners if isinstance(owner, Installation)), None)
        # A model compiled after the first run entered has another outer module, whose hooks would be missing.
        if found is not None and found.family.denoisers != family.denoisers:
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
        if frozen:
            found.freeze()
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
    # Asked of the objects, not of this thread's runs: another thread may have the pipe under control.
    encoders = (getattr(pipe, name, None) for name in ("encode_prompt", "_encode_prompt"))
    if any(hasattr(method, "attnctrl_run") for method in (*encoders, pipe.scheduler.step)):
        raise ControlError("share(pipe) was called inside a control block of that pipe: call it before entering.")
    light = copy.copy(pipe)
    light.scheduler = copy.deepcopy(pipe.scheduler)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3", "processor"):
        if getattr(pipe, name, None) is not None:
            setattr(light, name, copy.deepcopy(getattr(pipe, name)))
    return light
