"""The engine of one sampling: where the points of the controls meet the pipeline's own calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from attnctrl.calls import argument, last_rows, ordinary, previous, with_argument, with_previous
from attnctrl.change import Change
from attnctrl.compiled import site_masks
from attnctrl.control import ATTENTION_POINTS
from attnctrl.descend import Reader, descend
from attnctrl.errors import ControlError
from attnctrl.guidance import Prediction
from attnctrl.processors.work import Branch, Work, branches_of
from attnctrl.recording import Recorder, wants_record
from attnctrl.sampling import Active, Sampling
from attnctrl.schedule import Schedule
from attnctrl.sites import Site, Step

if TYPE_CHECKING:
    from attnctrl.run import Run


class Sampler:
    """Walks the controls of a run through one pipeline call."""

    def __init__(self, run: Run, sampling: Sampling) -> None:
        self.run, self.sampling, self.family = run, sampling, run.family
        self.scheduler = run.pipe.scheduler
        self.schedule = Schedule(self.scheduler)
        self.started = False
        self.steps_done = 0
        self.edited = -1
        self.change = Change()
        self.recorder: Recorder | None = None
        self.reader: Reader | None = None
        self.inner = False
        self.silent = False
        self.rows = 0
        # With nothing to do and nothing to record the hooks and processors pass everything by.
        self.idle = all(c.idle for c in run.controls) and not wants_record(run.controls, run.record)

    # the denoiser's call -------------------------------------------------------------------------------------
    def before_denoiser(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Pre-hook: starts the sampling, runs the noise and loss points once per step, hands on the new latents."""
        if self.inner or self.idle:
            return None
        sample, timestep = argument(args, kwargs, 0, "sample"), argument(args, kwargs, 1, "timestep")
        self.rows = sample.shape[0]
        self.branches()  # raises for batches that we do not understand
        if self.edited != self.steps_done:
            self.edited = self.steps_done
            self.change.clear()
            self.sampling.step = self.schedule.step(timestep, self.sampling.steps_seen)
            self.sampling.steps_seen.append(self.sampling.step)
            if not self.started:
                self._start(sample)
                self._edit_noise(sample)
            self._descend(args, kwargs, self.change.of_input(sample), self.sampling.step)
        changed = self.change.of_input(sample)
        if changed is not sample:
            args, kwargs = with_argument(args, kwargs, 0, "sample", changed)
        if self.family.compiled:
            assert self.sampling.step is not None
            masks = site_masks(self, self.sampling.step)
            if masks:
                kwargs = self.family.with_masks(kwargs, masks)
        return args, kwargs

    def after_denoiser(self, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: the guide point. For g wanted, (u, u + (g - u) / s) makes the pipeline arrive at g."""
        step = self.sampling.step
        guides = [] if self.inner or step is None else self._active("guide", step)
        if not guides or step is None:
            return None
        predicted = output[0]
        branches = {b.name: b.rows for b in self.branches()}
        cond, uncond = predicted[branches["cond"]], None
        scale = 1.0
        if "uncond" in branches:
            uncond, scale = predicted[branches["uncond"]], float(self.run.pipe.guidance_scale)

        def again(context: torch.Tensor | None) -> torch.Tensor:
            # Under torch.compile the masks travel in the keyword arguments that are sent again here.
            plain = self.family.with_masks(kwargs, {}) if self.family.compiled else kwargs
            with self._inside(silent=True):
                return self._forward(args, plain, None, context)[0]

        wanted = cond
        for one in guides:
            prediction = Prediction(cond, uncond, scale, again)
            with self.sampling.report.timed(one.index, one.control.name, "guide", step.index):
                wanted = one.control.guide(prediction, step, one.state)
            cond = wanted if uncond is None else uncond + (wanted - uncond) / scale
        changed = predicted.clone()
        changed[branches["cond"]] = cond
        if isinstance(output, tuple):
            return (changed, *output[1:])
        output.sample = changed
        return output

    def scheduler_step(self, stock: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The scheduler's step: receives the same change as the denoiser did; then the latents point."""
        if self.change.delta is not None:
            sample = argument(args, kwargs, 2, "sample")
            moved = self.change.of_latents(sample, self.schedule.input_scale(self.sampling.step))
            args, kwargs = with_argument(args, kwargs, 2, "sample", moved)
        result = stock(*args, **kwargs)
        self.steps_done += 1
        self.change.clear()
        step = self.sampling.step
        if step is not None:
            for one in self._active("latents", step):
                with self.sampling.report.timed(one.index, one.control.name, "latents", step.index):
                    latents = one.control.latents(previous(result), step, one.state)
                result = with_previous(result, latents)
            if step.index == step.total - 1:
                self.sampling.finished = True
        return result

    # what processors ask -------------------------------------------------------------------------------------
    def branches(self) -> tuple[Branch, ...]:
        """The guidance branches of the batch that the denoiser is given now."""
        pictures = self.sampling.batch
        return branches_of(self.rows if self.reader is None else pictures, pictures)

    def work(self, site: Site) -> Work | None:
        """What the processor of `site` has to do in this call; None for the stock attention."""
        step = self.sampling.step
        if self.silent or step is None:
            return None
        here = [a for a in self.sampling.by_site.get(site.name, ()) if step.progress in a.control.window]
        branches = self.branches()
        active = {b.name: tuple(a for a in here if b.name in a.control.branches) for b in branches}
        controlled = any(active.values())
        if self.reader is not None:
            observe: Any = self.reader if site.name in self.reader.names else None
        else:
            recorder = self.recorder
            observe = recorder if recorder is not None and site.name in recorder.names else None
        if not controlled and observe is None:
            return None
        return Work(
            step=step,
            latents=self.sampling.latent_grid,
            branches=branches,
            active=active,
            report=self.sampling.report,
            observe=observe,
            observed_only=not controlled and self.reader is None,
        )

    # one sampling --------------------------------------------------------------------------------------------
    def _start(self, sample: torch.Tensor) -> None:
        """The latents are known now: find the sites, let every control check its input and make its state."""
        self.started = True
        sampling = self.sampling
        installation = self.run.installation
        assert installation is not None
        sampling.latent_grid = self.family.latent_grid(sample)
        sampling.latent_channels = self.family.latent_channels()
        sampling.device, sampling.dtype = sample.device, sample.dtype
        sampling.sites = list(installation.sites)
        for index, control in enumerate(self.run.controls):
            if control.idle:
                continue
            # States outlive this step and reach losses, which cannot use tensors made in a caller's inference mode.
            with torch.inference_mode(False), torch.no_grad():
                state = control.begin(sampling)
            active = Active(index, control, state, frozenset(control.points()))
            sampling.active.append(active)
            if active.points & set(ATTENTION_POINTS):
                for site in control.where.select(sampling.sites, sampling.latent_grid):
                    sampling.by_site.setdefault(site.name, []).append(active)
        if not self.family.compiled:
            self.recorder = Recorder.make(sampling, self.run.controls, self.run.record, installation.foreign)
        elif self.run.record and self.run.record is not True:
            raise ControlError("maps cannot be recorded under torch.compile: record them on the uncompiled pipeline.")

    def _active(self, point: str, step: Step) -> list[Active]:
        return [a for a in self.sampling.active if point in a.points and step.progress in a.control.window]

    def _edit_noise(self, sample: torch.Tensor) -> None:
        for one in [a for a in self.sampling.active if "noise" in a.points]:
            step = self.sampling.step
            assert step is not None
            # The sampler's latents are noise times init_noise_sigma, the denoiser's input those times its scale.
            factor = self.schedule.input_scale(step) * float(self.scheduler.init_noise_sigma)
            rows, channels = self.branches()[-1].rows, self.sampling.latent_channels
            start = self.change.of_input(sample)[rows, :channels].float() / factor
            with self.sampling.report.timed(one.index, one.control.name, "noise", step.index):
                wanted = one.control.noise(start, self.sampling, one.state)
            # The difference before the factor: noise handed back unchanged must change nothing, rounding included.
            self.change.add((wanted - start) * factor)

    def _descend(self, args: tuple, kwargs: dict[str, Any], sample: torch.Tensor, step: Step) -> None:
        # The second evaluation of a second-order scheduler ignores the sample it is given.
        if not getattr(self.scheduler, "state_in_first_order", True):
            return
        losses = []
        for one in self._active("loss", step):
            descent = one.control.descent(step)
            if descent is not None and descent.scale != 0 and descent.iterations > 0:
                sites = one.control.where.select(self.sampling.sites, self.sampling.latent_grid)
                losses.append((one, descent, {s.name for s in sites}))
        if not losses:
            return
        if self.family.compiled:
            raise ControlError(f"{losses[0][0].control.name} needs gradients: use the pipeline without torch.compile.")

        checkpointed = self.family.checkpointed
        # A caller's inference mode left tensors that autograd must not save.
        args, kwargs = ordinary((args, kwargs))
        if checkpointed:
            kwargs = self.family.with_source(kwargs, self)

        def forward(leaf: torch.Tensor, reader: Reader) -> None:
            self.reader = reader
            self._forward(args, kwargs, leaf, None)

        cond = sample[self.branches()[-1].rows]
        try:
            # Until the gradients are taken: checkpointing runs layers again in the backward pass.
            with self._inside():
                self.change.add(descend(self.sampling, losses, cond, forward, stop=not checkpointed))
        finally:
            self.reader = None

    def _forward(self, args: tuple, kwargs: dict[str, Any], sample: torch.Tensor | None, context: Any) -> Any:
        """The denoiser once more on the conditional rows alone."""
        rows = self.sampling.batch
        args, kwargs = last_rows((args, kwargs), self.rows, rows)
        if sample is not None:
            args, kwargs = with_argument(args, kwargs, 0, "sample", sample)
        if context is not None:
            args, kwargs = with_argument(args, kwargs, 2, "encoder_hidden_states", context)
        return self.family.outer(*args, **kwargs)

    @contextmanager
    def _inside(self, silent: bool = False) -> Iterator[None]:
        """While the denoiser is called by us: hooks pass, and with `silent` no control acts."""
        self.inner, self.silent = True, silent
        try:
            yield
        finally:
            self.inner, self.silent = False, False
