"""The engine of one sampling: where the points of the controls meet the pipeline's own calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from attnctrl.calls import argument, last_rows, previous, with_argument, with_previous
from attnctrl.compiled import site_masks
from attnctrl.control import ATTENTION_POINTS
from attnctrl.descend import Reader, descend
from attnctrl.errors import ControlError
from attnctrl.guidance import Prediction
from attnctrl.processors.work import Branch, Work
from attnctrl.recording import Recorder
from attnctrl.sampling import Active, Sampling
from attnctrl.sites import Site, Step

if TYPE_CHECKING:
    from attnctrl.run import Run


class Sampler:
    """Walks the controls of a run through one pipeline call."""

    def __init__(self, run: Run, sampling: Sampling) -> None:
        self.run, self.sampling, self.family = run, sampling, run.family
        self.scheduler = run.pipe.scheduler
        self.started = False
        self.steps_done = 0
        self.edited = -1
        self.delta: torch.Tensor | None = None
        self.recorder: Recorder | None = None
        self.reader: Reader | None = None
        self.inner = False
        self.silent = False
        self.rows = 0

    # the denoiser's call -------------------------------------------------------------------------------------
    def before_denoiser(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Pre-hook: starts the sampling, runs the noise and loss points once per step, hands on the new latents."""
        if self.inner:
            return None
        sample, timestep = argument(args, kwargs, 0, "sample"), argument(args, kwargs, 1, "timestep")
        self.rows = sample.shape[0]
        self._check_rows()
        step = self._step(timestep)
        self.sampling.step = step
        if self.edited != self.steps_done:
            self.edited, self.delta = self.steps_done, None
            self.sampling.steps_seen.append(step)
            if not self.started:
                self._start(sample)
                self._edit_noise(sample)
            self._descend(args, kwargs, self._moved(sample), step)
        changed = self._moved(sample)
        if changed is not sample:
            args, kwargs = with_argument(args, kwargs, 0, "sample", changed)
        if self.family.compiled:
            masks = site_masks(self, step)
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
            with self._inside(silent=True):
                return self._forward(args, kwargs, None, context)[0]

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
        if self.delta is not None:
            sample = argument(args, kwargs, 2, "sample")
            moved = (sample.float() + self.delta.to(sample.device) / self._input_scale()).to(sample.dtype)
            args, kwargs = with_argument(args, kwargs, 2, "sample", moved)
        result = stock(*args, **kwargs)
        self.steps_done += 1
        self.delta = None
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
        count = self.sampling.batch
        if self.reader is not None or self.rows == count:
            return (Branch("cond", slice(0, count)),)
        return Branch("uncond", slice(0, count)), Branch("cond", slice(count, 2 * count))

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
            active = Active(index, control, control.begin(sampling), frozenset(control.points()))
            sampling.active.append(active)
            if active.points & set(ATTENTION_POINTS):
                for site in control.where.select(sampling.sites, sampling.latent_grid):
                    sampling.by_site.setdefault(site.name, []).append(active)
        if not self.family.compiled:
            self.recorder = Recorder.make(sampling, self.run.controls, self.run.record, set(installation.foreign))

    def _step(self, timestep: Any) -> Step:
        value = float(timestep.flatten()[0] if isinstance(timestep, torch.Tensor) else timestep)
        schedule = [float(t) for t in self.scheduler.timesteps]
        index = schedule.index(value) if value in schedule else min(self.steps_done, len(schedule) - 1)
        return Step(index, len(schedule), value, value / float(self.scheduler.config.num_train_timesteps))

    def _active(self, point: str, step: Step) -> list[Active]:
        return [a for a in self.sampling.active if point in a.points and step.progress in a.control.window]

    def _edit_noise(self, sample: torch.Tensor) -> None:
        for one in [a for a in self.sampling.active if "noise" in a.points]:
            step = self.sampling.step
            assert step is not None
            # The sampler's latents are noise times init_noise_sigma, the denoiser's input those times its scale.
            factor = self._input_scale() * float(self.scheduler.init_noise_sigma)
            start = self._moved(sample)[self.branches()[-1].rows, : self.sampling.latent_channels].float()
            with self.sampling.report.timed(one.index, one.control.name, "noise", step.index):
                wanted = one.control.noise(start / factor, self.sampling, one.state) * factor
            self._add(wanted - start)

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

        def forward(leaf: torch.Tensor, reader: Reader) -> None:
            self.reader = reader
            try:
                with self._inside():
                    self._forward(args, kwargs, leaf, None)
            finally:
                self.reader = None

        cond = sample[self.branches()[-1].rows]
        self._add(descend(self.sampling, losses, cond, forward, stop=not self.family.checkpointed))

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

    def _add(self, delta: torch.Tensor) -> None:
        if bool((delta != 0).any()):
            self.delta = delta if self.delta is None else self.delta + delta

    def _moved(self, sample: torch.Tensor) -> torch.Tensor:
        """The denoiser's input with this step's change in every branch; the very same tensor without a change."""
        if self.delta is None:
            return sample
        moved = sample.clone()
        channels = self.sampling.latent_channels
        repeat = self.rows // self.sampling.batch
        moved[:, :channels] += self.delta.to(sample.dtype).repeat(repeat, 1, 1, 1)
        return moved

    def _input_scale(self) -> float:
        """What `scale_model_input` multiplies the latents by at this step."""
        if self.sampling.step is None or not hasattr(self.scheduler, "scale_model_input"):
            return 1.0
        timestep = self.scheduler.timesteps[self.sampling.step.index]
        return float(self.scheduler.scale_model_input(torch.ones(1), timestep))

    def _check_rows(self) -> None:
        count = self.sampling.batch
        if self.rows not in (count, 2 * count):
            raise ControlError(
                f"the denoiser got a batch of {self.rows} for {count} pictures: attnctrl knows pipelines that run the "
                "conditional rows alone or after as many unconditional ones."
            )
