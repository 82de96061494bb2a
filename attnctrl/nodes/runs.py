"""`Run`: one sampling of a ComfyUI model under the controls of a plan."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnctrl.control import ATTENTION_POINTS
from attnctrl.guidance import Prediction
from attnctrl.nodes.hook import Chunk, Forward
from attnctrl.nodes.models import Architecture, architecture_of
from attnctrl.nodes.plan import APPLY, KEY, Asked, Plan
from attnctrl.nodes.prompts import Prompts
from attnctrl.nodes.steps import step_at
from attnctrl.recording import Recorder
from attnctrl.report import Report
from attnctrl.sampling import Active, Sampling
from attnctrl.sites import Step
from attnctrl.text import Text

logger = logging.getLogger("attnctrl.nodes")
BRANCHES = ("cond", "uncond")
"""By ComfyUI's numbers in `cond_or_uncond`."""
ASKING = "attnctrl_asking"


class Run:
    """Holds what the controls of a plan know during a sampling; a further sampling begins anew."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._reset()

    def _reset(self) -> None:
        self.sampling: Sampling | None = None
        self.recorder: Recorder | None = None
        self.size: tuple[int, ...] | None = None
        self.report = Report()
        self._begun: dict[Any, tuple[Sampling, Recorder | None]] = {}
        self._steps: dict[float, Step] = {}
        self.prompts = Prompts(self.plan, self.decline)
        self.declined: dict[str, None] = {}

    # ComfyUI's wrappers ---------------------------------------------------------------------------------------
    def outer_sample(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        """Around one whole sampling: begins anew, and says afterwards what acted."""
        self._reset()
        self.size = tuple(args[0].shape[2:])
        try:
            result = executor(*args, **kwargs)
            self._tell()
        finally:
            self.size = None
        return result

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around one call of the model, (x, sigma, c_concat, c_crossattn, control, transformer_options)."""
        latents, sigma, concat, context, control, options = args[:6]
        # ComfyUI may list a wrapper twice; the second time it is under this one already.
        if options.get(KEY) is self:
            return executor(*args, **kwargs)
        forward, context = self._forward(executor.class_obj, latents, sigma, context, options)
        hooked = options if forward is None else {**forward.options(options), KEY: self}
        return executor(latents, sigma, concat, context, control, hooked, *args[6:], **kwargs)

    def guided(self, asked: Asked, args: dict[str, Any], predict: Callable[..., Any]) -> torch.Tensor:
        """The guide point of a control, as ComfyUI's post_cfg function: `args` are its arguments.

        predict: ComfyUI's calc_cond_batch. Predictions are clean latents here, which changes no formula that is linear.
        """
        combined: torch.Tensor = args["denoised"]
        step = self._step(args["model"].model_sampling, float(args["sigma"].flatten()[0]))
        control = asked.control
        if step.progress not in control.window:
            return combined
        acted = []

        def again(*_: Any, **__: Any) -> torch.Tensor:
            before = self._calls(control)
            options = dict(args["model_options"])
            options["transformer_options"] = {**options["transformer_options"], ASKING: control}
            (found,) = predict(args["model"], [args["cond"]], args["input"], args["sigma"], options)
            acted.append(self._calls(control) > before)
            return found

        own = args["cond_denoised"]
        prediction = Prediction(own, args["uncond_denoised"], combined, again, _none, _none, _none, own)
        result = control.guide(prediction, step, None)
        if not all(acted):
            self.decline(f"{control.name} changed no layer of its prediction, so that it guides nothing")
            return combined
        return result

    # one sampling ---------------------------------------------------------------------------------------------
    def _forward(
        self, model: Any, latents: torch.Tensor, sigma: torch.Tensor, context: Any, options: dict[str, Any]
    ) -> tuple[Forward | None, Any]:
        """This call under the controls, and its text; None where the stock model runs."""
        network = getattr(model.diffusion_model, "_orig_mod", model.diffusion_model)
        known, numbers = architecture_of(network), options.get("cond_or_uncond")
        if isinstance(known, str) or not numbers or latents.shape[0] % len(numbers):
            self.decline(known if isinstance(known, str) else "the rows of the batch are not told apart")
            return None, context
        step, asking = self._step(model.model_sampling, float(sigma.flatten()[0])), options.get(ASKING)
        if not self._in_time(step) and asking is None:
            return None, context
        pictures = latents.shape[0] // len(numbers)
        rows = [slice(i * pictures, (i + 1) * pictures) for i in range(len(numbers))]
        own = [n == 0 and self.prompts.holds(context, r, _at(options.get("uuids"), i)) for i, (n, r) in
               enumerate(zip(numbers, rows, strict=True))]  # fmt: skip
        text, repeated = self.prompts.length(context, rows, own)
        if known.kind == "flux" and repeated:
            self.decline("the prompt is repeated to the length of another text: use texts of one length")
            own = [False] * len(own)
        cut = self.size is not None and self.size != tuple(latents.shape[2:])
        if cut:
            self.decline("a conditioning is for a part of the picture, where regions and maps are not known")
        self._begin(model, known, latents, pictures, text, cut)
        assert self.sampling is not None
        self.sampling.step = step
        chunks = []
        for number, one, mine in zip(numbers, rows, own, strict=True):
            branch, mine = BRANCHES[number], mine and not cut
            active = tuple(a for a in self.sampling.active if self._acts(a, step, branch, mine, asking))
            chunks.append(Chunk(branch, one, active, mine))
        recorder, edited = self.recorder if asking is None else None, self._edited(context, chunks, text)
        if not any(chunk.active or (chunk.own and recorder) for chunk in chunks):
            return None, edited
        forward = Forward(
            known, self.sampling.latent_grid, step, chunks, text, repeated, self.sampling.by_site,
            self.report, recorder, self.decline,
        )  # fmt: skip
        if recorder is not None and any(own):
            for recorded in self.plan.recorded:
                recorded.maps = recorder.maps
        return forward, edited

    def _in_time(self, step: Step) -> bool:
        """Whether anything of the plan can act in a step."""
        return bool(self.plan.phrases) or any(
            "context" in a.control.points() or step.progress in a.control.window for a in self.plan.asked
        )

    def _acts(self, one: Active, step: Step, branch: str, mine: bool, asking: Any) -> bool:
        asked = self.plan.asked[one.index]
        if asked.placed is not None and asked.words is not None and branch == "cond" and not mine:
            return False
        return one.control.acts(step, "again" if one.control is asking else branch, one.state)

    def _begin(
        self, model: Any, known: Architecture, latents: torch.Tensor, pictures: int, text: int, cut: bool
    ) -> None:
        """The sampling of such latents: every control checks its input and makes its state, once for each kind of call.

        ComfyUI may hand over each conditioning in a call of its own, with a text of another length.
        """
        dtype = getattr(model, "manual_cast_dtype", None) or model.get_dtype()
        grid, text = known.grid(latents), self.prompts.room(text)
        key = (grid, pictures, text, cut, latents.device, dtype)
        if key not in self._begun:
            sampling = Sampling(
                prompts=None if self.prompts.words is None else [self.prompts.words.tokens.prompt],
                tokenize=self.prompts.tokenize,
                images_per_prompt=pictures,
                prompt_count=1,
                guided=True,
                text_tokens=text,
                encode=lambda texts: Text(self.prompts.encode(texts).to(latents.device, dtype)),
                sites=list(known.sites),
                report=self.report,
            )
            sampling.latent_grid, sampling.device, sampling.dtype = grid, latents.device, dtype
            for index, asked in enumerate(self.plan.asked):
                if cut and asked.placed is not None:
                    continue
                control = asked.control
                active = Active(index, control, control.begin(sampling), frozenset(control.points()))
                sampling.active.append(active)
                for site in control.sites(sampling) if active.points & set(ATTENTION_POINTS) else ():
                    sampling.by_site.setdefault(site.name, []).append(active)
            records = bool(self.plan.phrases) and not cut
            recorder = Recorder.make(sampling, [], self.plan.phrases, {}) if records else None
            self._begun[key] = sampling, recorder
        self.sampling, self.recorder = self._begun[key]

    def _edited(self, context: Any, chunks: Sequence[Chunk], text: int) -> Any:
        """The text as the controls edit it, in the rows of the prompt; the same tensor where none does."""
        changed = context
        for one in self.sampling.active if self.sampling is not None else ():
            for chunk in chunks if "context" in one.points else ():
                if not chunk.own:
                    continue
                before = changed[chunk.rows, :text]
                edited = one.control.context(Text(before), self.sampling).positive  # type: ignore[arg-type]
                if edited is not before:
                    changed = changed.clone() if changed is context else changed
                    changed[chunk.rows] = edited.repeat(1, changed.shape[1] // text, 1).to(changed)
        return changed

    # reporting ------------------------------------------------------------------------------------------------
    def _step(self, sampling: Any, sigma: float) -> Step:
        if sigma not in self._steps:
            self._steps[sigma] = step_at(sampling, sigma)
        return self._steps[sigma]

    def _calls(self, control: Any) -> int:
        index = next(i for i, asked in enumerate(self.plan.asked) if asked.control is control)
        return sum(row.calls for (of, _), row in self.report.rows.items() if of == index)

    def decline(self, reason: str) -> None:
        """Say once a sampling why something stays as it is."""
        if reason not in self.declined:
            self.declined[reason] = None
            logger.warning("attnctrl: %s.", reason)

    def _tell(self) -> None:
        for index, asked in enumerate(self.plan.asked):
            if not self.report.acted(index):
                name, window = asked.control.name, asked.control.window
                self.decline(f"{name} acted nowhere in the part {window.start:g} to {window.end:g} of this sampling")
        if self.report.rows:
            logger.info("attnctrl: what acted\n%s", self.report)


def run_of(model_options: dict[str, Any]) -> Run:
    """The run of the sampling that has these options."""
    run: Run = model_options["transformer_options"]["wrappers"][APPLY][KEY][-1].__self__
    return run


def _none(*_: Any) -> torch.Tensor:
    raise NotImplementedError("ComfyUI's predictions are of clean latents: there is nothing to convert.")


def _at(values: Sequence[Any] | None, index: int) -> Any:
    return None if values is None else values[index]
