"""A picture and an instruction in, the changed picture out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from attnctrl.canvas import Canvas
from attnctrl.control import Control
from attnctrl.controls.editing.lime import Lime
from attnctrl.errors import ControlError
from attnctrl.install import share
from attnctrl.models import check_area, load_pipeline
from attnctrl.pipelines.methods import make_controls
from attnctrl.processors import family_of
from attnctrl.run import Run, control


class _Found(Exception):
    """Raised in the first of two passes once the region is known: the rest of it has no reader."""


@dataclass(frozen=True)
class InstructResult:
    """images: `num_images_per_prompt`, of the given picture's size and mode. run: their maps and report.

    region: bool (height, width) of the latents, where a first pass found the place of the edit; else None.
    """

    images: list[Image.Image]
    run: Run
    region: torch.Tensor | None = None


class InstructPipeline:
    """Changes a given picture by an instruction, on InstructPix2Pix.

        edit = InstructPipeline.from_pretrained("timbrooks/instruct-pix2pix")
        edit(picture, "make the mountains snowy", method="focus-on-instruction", phrases=["mountains"]).images[0]

    The base pipeline stays `edit.pipe`. Raises ControlError for pipelines that are no InstructPix2Pix.
    """

    def __init__(self, pipe: Any) -> None:
        if not getattr(family_of(pipe), "instructed", False):
            raise ControlError(f"InstructPipeline needs an InstructPix2Pix pipeline, and got {type(pipe).__name__}.")
        self.pipe = pipe

    @classmethod
    def from_pretrained(cls, model: str, **kwargs: Any) -> InstructPipeline:
        """model: "shapes-instruct", a folder, a hub id; device, dtype: see `attnctrl.models.load_pipeline`."""
        return cls(load_pipeline(model, **kwargs))

    def __call__(
        self,
        image: Any,
        instruction: str,
        *,
        method: str | Control | Sequence[str | Control] = "none",
        guidance: float = 7.5,
        image_guidance: float = 1.5,
        find_guidance: float | None = None,
        mask: Any = None,
        feather: int = 4,
        num_inference_steps: int = 50,
        seed: int = 0,
        record: bool | Sequence[str] = True,
        **kwargs: Any,
    ) -> InstructResult:
        """Draw `image` as the instruction says.

        image: as for `EditPipeline`. method: an editing method of the registry, a control, several of them, or "none".
        guidance, image_guidance: scales of text and picture. find_guidance: the scale of the text in a first pass from
        the same seed, in which `Lime` finds its region (in the paper 5.5, and 2 for `guidance`); None finds it in the
        one pass. mask: where the picture may change, of any kind that `Region` takes; outside it, beyond `feather`
        pixels, are the given pixels, byte for byte. seed: of the noise. kwargs: arguments of the base pipeline, and
        parameters of the method.
        Raises ControlError for unknown names, bad pictures and masks, and for a first pass without any use.
        """
        canvas = Canvas.of(image, int(self.pipe.vae_scale_factor))
        check_area(self.pipe, *canvas.picture.size)
        whole = None if mask is None else canvas.mask(mask)
        accepted = inspect.signature(type(self.pipe).__call__).parameters
        options = {name: value for name, value in kwargs.items() if name in accepted}
        overrides = {name: value for name, value in kwargs.items() if name not in accepted}
        controls = make_controls(method, "editing", {}, overrides)
        pipe = share(self.pipe)
        arguments = {
            **options,
            "prompt": instruction,
            "image": canvas.padded,
            "image_guidance_scale": image_guidance,
            "num_inference_steps": num_inference_steps,
        }
        region = None
        if find_guidance is not None:
            index = next((i for i, c in enumerate(controls) if isinstance(c, Lime) and c.region is None), None)
            if index is None:
                raise ControlError("find_guidance is for Lime without a region, which is not among the methods.")
            lime = controls[index]
            assert isinstance(lime, Lime)
            region = _found(pipe, lime, {**arguments, "guidance_scale": find_guidance}, seed)
            controls[index] = replace(lime, region=region.float())
        with control(pipe, *controls, record=record) as run:
            generator = torch.Generator().manual_seed(seed)
            drawn = pipe(**arguments, guidance_scale=guidance, generator=generator).images
        return InstructResult([canvas.finish(one, whole, feather) for one in drawn], run, region)


def _found(pipe: Any, lime: Lime, arguments: dict[str, Any], seed: int) -> torch.Tensor:
    """The region that LIME finds in a pass of its own, which ends there: bool (height, width) of the latents."""
    found: list[torch.Tensor] = []
    with control(pipe, lime, record=False) as run:

        def stop(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            sampling = run.sampling
            assert sampling is not None
            state = sampling.active[0].state
            if state.features:
                found.append(state.find(lime.clusters, lime.top)[0, 0].cpu())
                raise _Found
            return values

        try:
            pipe(**arguments, generator=torch.Generator().manual_seed(seed), callback_on_step_end=stop)
        except _Found:
            pipe.maybe_free_model_hooks()
    return found[0]
