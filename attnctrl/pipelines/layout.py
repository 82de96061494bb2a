"""Prompt and regions in, picture out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from attnctrl.controls import REGISTRY
from attnctrl.layout import Regions
from attnctrl.models import call_arguments, load_pipeline
from attnctrl.pipelines.methods import Methods, make_controls
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

    def overlay(self, phrase: str, image: int = 0) -> Image.Image:
        """Picture number `image` under the recorded attention of `phrase`. Raises KeyError if that was not recorded."""
        return self.run.maps.overlay(self.images[image], phrase, image)


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
        method: Methods = "loco",
        *,
        guidance: float | None = None,
        record: bool | Sequence[str] = True,
        **kwargs: Any,
    ) -> LayoutResult:
        """Draw `prompt` with each region's phrase in its place.

        regions: one list for all prompts, or one per prompt. method: a name from the registry, a control, several of
        them, names with the parameters of each, or "none" for the stock picture. guidance: a scale under
        whatever name the base pipeline has for it, see `attnctrl.models.call_arguments`. kwargs: arguments of the base
        pipeline, and parameters of the method.
        Raises ControlError for unknown methods or parameters and for bad regions.
        """
        accepted = inspect.signature(type(self.pipe).__call__).parameters
        options = {name: value for name, value in kwargs.items() if name in accepted}
        overrides = {name: value for name, value in kwargs.items() if name not in accepted}
        controls = make_controls(method, "layout", {"regions": regions}, overrides)
        with control(self.pipe, *controls, record=record) as run:
            output = self.pipe(**call_arguments(self.pipe, prompt, guidance, options))
        return LayoutResult(output, run)
