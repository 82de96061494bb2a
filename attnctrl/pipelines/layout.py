"""Prompt and regions in, picture out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from attnctrl.control import Control
from attnctrl.controls import REGISTRY, Method, method
from attnctrl.errors import ControlError
from attnctrl.layout import Regions
from attnctrl.models import call_arguments, load_pipeline
from attnctrl.processors import attention_kinds
from attnctrl.run import Run, control


@dataclass(frozen=True)
class LayoutResult:
    """output: what the base pipeline returned. run: its maps, losses per step, and what was applied where."""

    output: Any
    run: Run

    @property
    def images(self) -> list[Image.Image]:
        """The pictures (or latents, as `output_type` asks)."""
        return self.output.images


class LayoutPipeline:
    """Puts objects where regions say, on any supported base pipeline, by one or several registered methods.

        layout = LayoutPipeline.from_pretrained("shapes-sd")
        result = layout("a red circle and a blue square", regions, method="loco")
        result.images[0]; result.run.maps["a red circle"]; print(result.run.report)

    The base pipeline stays `layout.pipe`; move it, offload it, load LoRAs into it as usual.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @classmethod
    def from_pretrained(cls, model: str, **kwargs: Any) -> LayoutPipeline:
        """model: "shapes-sd", "shapes-dit", a folder, a hub id; device, dtype: see `attnctrl.models.load_pipeline`."""
        return cls(load_pipeline(model, **kwargs))

    @property
    def methods(self) -> list[str]:
        """The registered layout methods that act on a kind of attention which the base pipeline has."""
        kinds = attention_kinds(self.pipe)
        return [m.name for m in REGISTRY.values() if m.task == "layout" and kinds & {*m.where.kinds}]

    def __call__(
        self,
        prompt: str | list[str],
        regions: Regions,
        method: str | Control | Sequence[str | Control] = "loco",
        *,
        guidance: float | None = None,
        record: bool | Sequence[str] = True,
        **kwargs: Any,
    ) -> LayoutResult:
        """Draw `prompt` with each region's phrase in its place.

        regions: one list for all prompts, or one per prompt. method: a name from the registry, a control, several of
        them, or "none" for the stock picture. guidance: a scale under whatever name the base pipeline has for it, see
        `attnctrl.models.call_arguments`. kwargs: arguments of the base pipeline, and parameters of the method.
        Raises ControlError for unknown methods or parameters and for bad regions.
        """
        accepted = inspect.signature(type(self.pipe).__call__).parameters
        options = {name: value for name, value in kwargs.items() if name in accepted}
        overrides = {name: value for name, value in kwargs.items() if name not in accepted}
        controls = make_controls(method, regions, overrides)
        with control(self.pipe, *controls, record=record) as run:
            output = self.pipe(**call_arguments(self.pipe, prompt, guidance, options))
        return LayoutResult(output, run)


def make_controls(
    methods: str | Control | Sequence[str | Control], regions: Regions, overrides: dict[str, Any]
) -> list[Control]:
    """The controls that `methods` names, each with its share of `overrides`.

    With several methods a parameter must belong to exactly one of them. Raises ControlError otherwise.
    """
    given = [methods] if isinstance(methods, str | Control) else list(methods)
    named = [_layout_method(m) for m in given if isinstance(m, str) and m != "none"]
    for parameter in overrides:
        owners = [m.name for m in named if parameter in m.params or parameter in ("window", "where")]
        if len(owners) > 1:
            raise ControlError(
                f'parameter "{parameter}" belongs to {" and ".join(owners)}: make the controls yourself and pass them '
                "as method=[...]."
            )
        if not owners:
            names = ", ".join(m.name for m in named) or "no method"
            known = ", ".join(sorted({p for m in named for p in m.params})) or "none"
            raise ControlError(f'"{parameter}" is no parameter of {names} nor of the pipeline: known are {known}.')
    made: list[Control] = []
    for item in given:
        if isinstance(item, Control):
            made.append(item)
        elif item != "none":
            chosen = _layout_method(item)
            own = {k: v for k, v in overrides.items() if k in chosen.params or k in ("window", "where")}
            made.append(chosen.make(regions, **own))
    return made


def _layout_method(name: str) -> Method:
    found = method(name)
    if found.task != "layout":
        raise ControlError(f'method "{name}" takes no regions: it belongs to the task {found.task}.')
    return found
