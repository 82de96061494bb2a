"""`control(pipe, ...)`: one stock pipeline under control, and back to stock afterwards."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from attnctrl.control import ATTENTION_POINTS, Control
from attnctrl.errors import ControlError
from attnctrl.install import RUNS, Installation, acquire, latest, release
from attnctrl.maps import Maps
from attnctrl.opening import open_sampling
from attnctrl.processors import family_of
from attnctrl.processors.family import Family
from attnctrl.processors.work import Work
from attnctrl.recording import wants_record
from attnctrl.report import Report
from attnctrl.sampler import Sampler
from attnctrl.sampling import LossValue, Sampling
from attnctrl.sites import Site


class Run:
    """One control block. Inside it every call of the pipeline is a `Sampling`; the properties speak of the last one.

    record: True keeps maps of the phrases that the controls name, False keeps none, a list names phrases.
    """

    def __init__(
        self,
        pipe: Any,
        controls: Sequence[Control],
        record: bool | Sequence[str],
        prompt: str | list[str] | None,
    ) -> None:
        outer = [run for run in RUNS.get() if run.pipe is pipe]
        self.pipe: Any = pipe
        self.controls: tuple[Control, ...] = (*(outer[-1].controls if outer else ()), *controls)
        self.record = record
        self.prompt = prompt
        self.family: Family = family_of(pipe)
        self.samplings: list[Sampling] = []
        self.installation: Installation | None = None
        self.sampler: Sampler | None = None
        self.hooks: list[Any] = []
        self._shadowed: list[tuple[Any, str, bool, Any]] = []
        self._called = False
        # With nothing to do and nothing to record the model is left alone.
        self.idle = all(c.idle for c in self.controls) and not wants_record(self.controls, record)
        check_together(self.controls)

    @property
    def sampling(self) -> Sampling | None:
        """The pipeline call that is under way, or the last one."""
        return self.samplings[-1] if self.samplings else None

    @property
    def maps(self) -> Maps:
        """Recorded maps of the last pipeline call."""
        return self.sampling.maps if self.sampling else Maps()

    @property
    def losses(self) -> list[LossValue]:
        """Every loss evaluation of the last pipeline call, in order."""
        return self.sampling.losses if self.sampling else []

    @property
    def report(self) -> Report:
        """What acted where in the last pipeline call, and what it cost."""
        return self.sampling.report if self.sampling else Report()

    def state(self, control: Control) -> Any:
        """What `control` kept in the last pipeline call. Raises ControlError where it took no part in one."""
        for one in self.sampling.active if self.sampling else ():
            if one.control is control:
                return one.state
        raise ControlError(
            f"{control.name} took no part in this run: pass it to control() and call the pipeline first."
        )

    # attach and restore -------------------------------------------------------------------------------------
    def attach(self) -> None:
        if not self.idle:
            reads = any({"loss", "noise"} & set(c.points()) and not c.idle for c in self.controls)
            self.installation = acquire(self.family, frozen=reads)
            self._refuse_foreign()
        if hasattr(self.pipe, "check_inputs"):
            self._shadow(self.pipe, "check_inputs", self._check_inputs)
        self._shadow(self.pipe, self.family.encoder, self._encode_prompt)
        self._shadow_step()

    def detach(self) -> None:
        for owner, name, had, before in reversed(self._shadowed):
            if had:
                setattr(owner, name, before)
            else:
                owner.__dict__.pop(name, None)
        self._shadowed.clear()
        self.unhook()
        if self.installation is not None:
            release(self.installation)

    def unhook(self) -> None:
        """Remove what the controls of the last pipeline call hooked into the denoiser."""
        for handle in self.hooks:
            handle.remove()
        self.hooks.clear()

    def _shadow(self, owner: Any, name: str, replacement: Callable) -> None:
        """Put a method of this run before the class's own on one object; the class is not touched."""
        had = name in owner.__dict__
        before = getattr(owner, name)
        holder = getattr(before, "attnctrl_run", None)
        if holder is not None:
            _check_thread(holder)
        stock = getattr(before, "attnctrl_stock", before)

        # wraps keeps the signature visible: pipelines inspect `step` to decide whether to pass generator and eta.
        @functools.wraps(stock)
        def shadow(*args: Any, **kwargs: Any) -> Any:
            _check_thread(self)
            return replacement(stock, *args, **kwargs)

        shadow.attnctrl_stock = stock  # type: ignore[attr-defined]
        shadow.attnctrl_run = self  # type: ignore[attr-defined]
        self._shadowed.append((owner, name, had, before))
        setattr(owner, name, shadow)

    def _refuse_foreign(self) -> None:
        """Layers with a processor that we cannot reproduce stay stock; a control that needs one is refused."""
        assert self.installation is not None
        for control in self.controls:
            points = set(control.points())
            if control.idle or not points & {*ATTENTION_POINTS, "loss"}:
                continue
            for site in self.installation.sites:
                processor = self.installation.foreign.get(site.name)
                if processor and site.kind in control.where.kinds:
                    raise ControlError(
                        f"{control.name} needs {site.kind}-attention, which {processor} has taken over at {site.name}: "
                        "remove what put it there first (for an IP-Adapter: pipe.unload_ip_adapter())."
                    )

    # the doors into a stock pipeline ------------------------------------------------------------------------
    def _check_inputs(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        # The first thing that a pipeline's call does.
        self._called = True
        return stock(*args, **kwargs)

    def _encode_prompt(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        self._shadow_step()
        arguments = inspect.signature(stock).bind(*args, **kwargs)
        arguments.apply_defaults()
        # Z-Image writes its chat into the caller's list of prompts.
        given = {n: list(v) if isinstance(v, list) else v for n, v in arguments.arguments.items()}
        outputs = stock(*args, **kwargs)
        opened = self.sampling is not None and not self.sampling.steps_seen and not self._called
        self._called = False
        if self.sampling is not None and opened and self.family.encodes == 2:
            # The negative prompt, in a call of its own.
            self.sampling.guided = True
            return outputs
        self.sampler, outputs = open_sampling(self, stock, given, outputs)
        self.samplings.append(self.sampler.sampling)
        return outputs

    def _shadow_step(self) -> None:
        """Stand before the step of the pipeline's scheduler, which users exchange between two calls."""
        scheduler = self.pipe.scheduler
        if not any(owner is scheduler for owner, *_ in self._shadowed):
            self._shadow(scheduler, "step", functools.partial(self._step, scheduler))

    def _step(self, scheduler: Any, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        # Two pipelines may share one scheduler object; the run that shadowed it last need not be the one sampling.
        run = latest(run for run in RUNS.get() if run.sampler is not None and run.sampler.scheduler is scheduler)
        if run is None or run.sampler is None or run.idle:
            return stock(*args, **kwargs)
        return run.sampler.scheduler_step(stock, args, kwargs)

    def before_denoiser(self, denoiser: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return self.sampler.before_denoiser(denoiser, args, kwargs) if self.sampler else None

    def after_denoiser(self, args: tuple, kwargs: dict, output: Any) -> None:
        if self.sampler:
            self.sampler.after_denoiser(args, kwargs, output)

    def work(self, site: Site) -> Work | None:
        return self.sampler.work(site) if self.sampler else None

    def check_acted(self) -> None:
        """Raise ControlError for a control that acted in none of the finished pipeline calls, saying why."""
        done = [s for s in self.samplings if s.steps_seen]
        if not done:
            return
        for index, control in enumerate(self.controls):
            if control.idle or any(s.report.acted(index) for s in done):
                continue
            raise ControlError(f"{control.name} acted nowhere: {_why_not(control, done[-1])}")


def _check_thread(run: Run) -> None:
    if run not in RUNS.get():
        raise ControlError(
            "this pipeline object is under control in another thread: give each thread its own with share(pipe), and "
            "enter control() in the thread that calls it."
        )


def _why_not(control: Control, sampling: Sampling) -> str:
    window, seen = control.window, [s.progress for s in sampling.steps_seen]
    if not any(p in window for p in seen):
        return (
            f"its window is {window.start:g} to {window.end:g} of the noise schedule, and the run's steps were at "
            f"{min(seen):.2f} to {max(seen):.2f}; widen the window (image-to-image starts late: raise its strength)."
        )
    if not set(control.points()) - {"context", "noise", "latents", "guide"}:
        return "it implements no point that this pipeline calls."
    if not control.where.select(sampling.sites, sampling.latent_grid):
        return f"{control.where} selects none of the {len(sampling.sites)} attention sites."
    if not control.sites(sampling):
        return f"its parameters leave none of the {len(sampling.sites)} attention sites: lower what leaves layers out."
    if "loss" in control.points():
        return "its `descent` asked for nothing in the steps that ran."
    return "the run has no guidance branch of those it acts on (" + ", ".join(control.branches) + ")."


def check_together(controls: Sequence[Control]) -> None:
    """Raise ControlError for things that are not controls and for two controls that cannot work together."""
    for control in controls:
        if not isinstance(control, Control):
            raise ControlError(f"{control!r} is not a control: pass instances such as RegionMask(regions).")
    for i, first in enumerate(controls):
        for second in controls[i + 1 :]:
            reason = first.conflict(second) or second.conflict(first)
            if reason:
                raise ControlError(f"{first.name} and {second.name} cannot work together: {reason}")
    replacing = [c.name for c in controls if "attend" in c.points() and not c.idle]
    if len(replacing) > 1:
        raise ControlError(f"{replacing[0]} and {replacing[1]} cannot work together: both replace the attention.")


@contextmanager
def control(
    pipe: Any,
    *controls: Control,
    record: bool | Sequence[str] = True,
    prompt: str | list[str] | None = None,
) -> Iterator[Run]:
    """Run a stock diffusers pipeline under controls.

    pipe: a supported pipeline; it is left exactly as it was, also after an exception. controls: applied in this
    order. record: whether attention maps are kept (see `Run`). prompt: the text behind `prompt_embeds`, for pipeline
    calls that pass embeddings only.

    Raises ControlError for bad input, for controls that cannot work together and, when the block ends well, for a
    control that acted nowhere; the pictures that the pipeline returned are then still yours.
    """
    run = Run(pipe, controls, record, prompt)
    token = RUNS.set((*RUNS.get(), run))
    try:
        run.attach()
        yield run
    finally:
        run.detach()
        RUNS.reset(token)
    run.check_acted()
