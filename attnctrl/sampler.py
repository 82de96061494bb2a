"""The engine of one sampling: where the points of the controls meet the pipeline's own calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attnctrl.calls import Signature, previous, with_previous
from attnctrl.change import Change
from attnctrl.compiled import site_masks
from attnctrl.control import ATTENTION_POINTS
from attnctrl.descend import Reader
from attnctrl.errors import ControlError
from attnctrl.features import hook
from attnctrl.processors.work import Branch, Work
from attnctrl.recording import Recorder
from attnctrl.sampling import Active, FeatureEdit, Sampling
from attnctrl.sampling_points import descend_losses, edit_noise, guided, with_words
from attnctrl.schedule import Schedule
from attnctrl.sites import MASKS, Grid, Site, Step

if TYPE_CHECKING:
    from attnctrl.kernels import TokenGroups
    from attnctrl.run import Run


class Sampler:
    """Walks the controls of a run through one pipeline call."""

    def __init__(self, run: Run, sampling: Sampling) -> None:
        self.run, self.sampling, self.family = run, sampling, run.family
        self.denoiser = run.family.denoisers[0]
        self.scheduler = run.pipe.scheduler
        self.schedule = Schedule(self.scheduler)
        sampling.noised_next = self.schedule.noised_next
        self.step_signature = Signature(type(self.scheduler).step)
        self.started = False
        self.steps_done = 0
        self.calls = 0
        self.change = Change()
        self.predicted: dict[str, torch.Tensor] = {}
        self.asked: dict[str, tuple[tuple, dict[str, Any]]] = {}
        self.recorder: Recorder | None = None
        self.reader: Reader | None = None
        self.numbered: list[TokenGroups] = []
        self.inner = False
        self.silent = False
        self.asking: tuple[Active, str] | None = None  # who asked for a further prediction, of which branch
        self.rows = self.text = 0

    # the denoiser's call -------------------------------------------------------------------------------------
    def before_denoiser(
        self, denoiser: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Pre-hook: starts the sampling, runs the noise and loss points once per step, hands on the new latents."""
        if self.inner or self.run.idle:
            return None
        if self.family.compiled and not self.family.names.extras:
            raise ControlError(
                f"{type(self.family.model).__name__} is compiled, and attnctrl controls it uncompiled only: use the "
                "pipeline without torch.compile."
            )
        self.denoiser = denoiser
        names, signature = self.family.names, self.family.signature
        sample = self.family.sample(args, kwargs)
        self.rows = sample.shape[0]
        self.calls += 1
        if not self.started:
            known = self.sampling.images_per_prompt
            self.sampling.images_per_prompt = self.family.images_per_prompt(args, kwargs) or known
        # Raises for batches that we do not understand.
        self.text = self.family.text_tokens(args, kwargs, self.conditional_rows())
        if self.calls == 1:
            timestep = self.family.timestep(signature.get(args, kwargs, names.timestep))
            self.sampling.step = self.schedule.step(timestep, self.steps_done)
            self.sampling.steps_seen.append(self.sampling.step)
            if not self.started:
                self._start(sample, self.family.latent_grid(args, kwargs))
                edit_noise(self, args, kwargs, sample, self.sampling.step)
            descend_losses(self, *with_words(self, args, kwargs), self.moved(sample), self.sampling.step)
        args, kwargs = with_words(self, args, kwargs)
        changed = self.moved(sample)
        if changed is not sample:
            args, kwargs = self.family.with_sample(args, kwargs, changed)
        if self.family.compiled:
            assert self.sampling.step is not None
            masks = site_masks(self, self.sampling.step, sample)
            if masks:
                kwargs = self.family.with_extra(kwargs, MASKS, masks)
        return args, kwargs

    def after_denoiser(self, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: keeps the predictions for the guide point."""
        step = self.sampling.step
        if self.inner or step is None or not self.active_at("guide", step):
            return
        predicted = self.family.output(output)
        for branch in self.branches():
            self.predicted[branch.name] = predicted[branch.rows]
            self.asked[branch.name] = self.family.picked(args, kwargs, self.rows, branch.rows)

    def scheduler_step(self, stock: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The scheduler's step: first the guide point; the same change as the denoiser received; the latents point."""
        signature, step, grid = self.step_signature, self.sampling.step, self.sampling.latent_grid
        if self.predicted and step is not None:
            combined = signature.get(args, kwargs, "model_output")
            args, kwargs = signature.put(args, kwargs, "model_output", guided(self, combined, step))
        if self.change.delta is not None:
            sample, scale = signature.get(args, kwargs, "sample"), self.schedule.input_scale(step)
            moved = self.change.of_latents(sample, scale, lambda given: self.family.drawn(given, grid))
            args, kwargs = signature.put(args, kwargs, "sample", moved)
        result = stock(*args, **kwargs)
        self.steps_done += 1
        self.calls = 0
        self.change.clear()
        self.predicted.clear()
        if step is not None:
            for one in self.active_at("latents", step):
                before = previous(result)
                with self.sampling.report.timed(one.index, one.control.name, "latents", step.index):
                    latents = one.control.latents(self.family.unpacked(before, grid), step, one.state)
                result = with_previous(result, self.family.packed(latents, grid))
            if step.index == step.total - 1:
                self.sampling.finished = True
        return result

    def moved(self, sample: torch.Tensor) -> torch.Tensor:
        """The denoiser's input with this step's change."""
        grid = self.sampling.latent_grid
        return self.change.of_input(sample, lambda given: self.family.latents(given, grid))

    # what processors ask -------------------------------------------------------------------------------------
    def branches(self) -> tuple[Branch, ...]:
        """The guidance branches of the batch that the denoiser is given now."""
        pictures = self.sampling.batch
        if self.reader is not None:
            return (Branch("cond", slice(0, pictures)),)
        if self.asking is not None:
            return (Branch(self.asking[1], slice(0, pictures)),)
        return self.family.branches(self.rows, pictures, self.calls - 1)

    def conditional_rows(self) -> slice:
        """The rows of the conditional branch, or of the only one that the call has."""
        branches = self.family.branches(self.rows, self.sampling.batch, self.calls - 1)
        return next((b.rows for b in branches if b.name == "cond"), branches[-1].rows)

    def work(self, site: Site) -> Work | None:
        """What the processor of `site` has to do in this call; None for the stock attention."""
        step = self.sampling.step
        if self.silent or step is None:
            return None
        here = self.sampling.by_site.get(site.name, ())
        branches = self.branches()
        asks = None if self.asking is None else self.asking[0]
        active = {
            b.name: tuple(a for a in here if a.control.acts(step, "again" if a is asks else b.name, a.state))
            for b in branches
        }
        controlled = any(active.values())
        if self.reader is not None:
            observe: Any = self.reader if site.name in self.reader.names else None
        elif self.asking is not None:
            observe = None  # maps are of the step's own prediction
        else:
            recorder = self.recorder
            conditional = any(branch.name == "cond" for branch in branches)
            wanted = recorder is not None and site.name in recorder.names and conditional
            observe = recorder if wanted else None
        if not controlled and observe is None:
            return None
        return Work(
            step=step,
            latents=self.sampling.latent_grid,
            text=self.text,
            branches=branches,
            active=active,
            report=self.sampling.report,
            observe=observe,
            observed_only=not controlled and self.reader is None,
        )

    # one sampling --------------------------------------------------------------------------------------------
    def _start(self, sample: torch.Tensor, grid: Grid) -> None:
        """The latents are known now: let every control check its input and make its state."""
        self.started = True
        sampling, installation = self.sampling, self.run.installation
        assert installation is not None
        sampling.latent_grid = grid
        sampling.device, sampling.dtype = sample.device, sample.dtype
        sampling.residuals = [site for site, _ in self.family.residuals()]
        sampling.adapters = [site for site, _ in self.family.adapters()]
        sampling.skips = [site for site, _ in self.family.skips()]
        self.run.unhook()
        for index, control in enumerate(self.run.controls):
            if control.idle:
                continue
            wanted: list[tuple[Site, FeatureEdit]] = []
            sampling.edit_features = partial(_want, wanted)
            # States outlive this step and reach losses, which cannot use tensors made in a caller's inference mode.
            with torch.inference_mode(False), torch.no_grad():
                state = control.begin(sampling)
            active = Active(index, control, state, frozenset(control.points()))
            sampling.active.append(active)
            for site, edit in wanted:
                sampling.by_site.setdefault(site.name, []).append(active)
                self.run.hooks.append(hook(self, active, site, edit))
            if active.points & set(ATTENTION_POINTS):
                for site in control.sites(sampling):
                    sampling.by_site.setdefault(site.name, []).append(active)
        sampling.edit_features = None
        if not self.family.compiled:
            self.recorder = Recorder.make(sampling, self.run.controls, self.run.record, installation.foreign)
        elif self.run.record and self.run.record is not True:
            raise ControlError("maps cannot be recorded under torch.compile: record them on the uncompiled pipeline.")

    def active_at(self, point: str, step: Step) -> list[Active]:
        return [a for a in self.sampling.active if point in a.points and step.progress in a.control.window]

    def forward(self, args: tuple, kwargs: dict[str, Any], sample: torch.Tensor | None, context: Any) -> Any:
        """The denoiser once more, with arguments for the conditional rows alone."""
        if sample is not None:
            args, kwargs = self.family.with_sample(args, kwargs, sample)
        if context is not None:
            args, kwargs = self.family.with_text(args, kwargs, context)
        return self.denoiser(*args, **kwargs)

    @contextmanager
    def inside(self, silent: bool = False, asking: tuple[Active, str] | None = None) -> Iterator[None]:
        """While the denoiser is called by us: hooks pass, and with `silent` no control acts.

        asking: the control that wants a further prediction of the branch of this name, under all controls.
        """
        self.inner, self.silent, self.asking = True, silent, asking
        try:
            yield
        finally:
            self.inner, self.silent, self.asking = False, False, None


def _want(wanted: list[tuple[Site, FeatureEdit]], site: Site, edit: FeatureEdit) -> None:
    wanted.append((site, edit))
