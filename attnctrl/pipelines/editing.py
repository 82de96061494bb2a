"""A picture and the wanted change in, the changed picture out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from PIL import Image, ImageChops

from attnctrl.canvas import Canvas
from attnctrl.control import Control
from attnctrl.controls import REGISTRY
from attnctrl.controls.editing.source_blend import SourceBlend
from attnctrl.edits import Edit, edited
from attnctrl.install import share
from attnctrl.inversion import Job, inversion
from attnctrl.models import call_arguments, load_pipeline
from attnctrl.pipelines.methods import make_controls
from attnctrl.regions import Region
from attnctrl.run import Run, control


@dataclass(frozen=True)
class EditResult:
    """images: the edited pictures, of the given one's size and mode. reconstruction: what the run made of the source.

    prompt: the edited prompt. run: its maps, losses per step, and what was applied where.
    """

    images: list[Image.Image]
    reconstruction: Image.Image
    prompt: str
    run: Run


class EditPipeline:
    """Changes a given picture by changing its prompt, on any supported text-to-image pipeline.

        edit = EditPipeline.from_pretrained("shapes-sd")
        result = edit(picture, "a red circle and a blue square", edits=[Edit("red circle", "green star")])
        result.images[0]; result.reconstruction; print(result.run.report)

    The base pipeline stays `edit.pipe` and keeps its scheduler.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @classmethod
    def from_pretrained(cls, model: str, **kwargs: Any) -> EditPipeline:
        """model: "shapes-sd", "shapes-dit", a folder, a hub id; device, dtype: see `attnctrl.models.load_pipeline`."""
        return cls(load_pipeline(model, **kwargs))

    @property
    def methods(self) -> list[str]:
        """The registered editing methods."""
        return [m.name for m in REGISTRY.values() if m.task == "editing"]

    def __call__(
        self,
        image: Any,
        source_prompt: str,
        target_prompt: str | None = None,
        *,
        edits: Sequence[Edit] = (),
        method: str | Control | Sequence[str | Control] | Mapping[str, Mapping[str, Any]] = "prompt-to-prompt",
        inversion: str = "direct",
        mask: Any = None,
        composite: bool = True,
        feather: int = 4,
        num_inference_steps: int = 50,
        num_images_per_prompt: int = 1,
        guidance: float | None = None,
        seed: int = 0,
        record: bool | Sequence[str] = True,
        **kwargs: Any,
    ) -> EditResult:
        """Draw `image` anew under another prompt.

        image: a PIL picture or array of any size and mode; nothing is resized, sizes that are not whole latents are
        padded. source_prompt: what the picture shows. target_prompt: what the edited one shows, or `edits` of words
        of the source prompt, from which it is made. method: a name from the registry, a control, several of them,
        names with the parameters of each, or "none" for the edited prompt alone. inversion: a name of
        `attnctrl.inversion.INVERSIONS`. mask: where the picture may change (by default the union of the edits' masks,
        if each has one); outside it the latents are the source's and, with `composite`, the pixels are the given ones,
        byte for byte beyond `feather` pixels. guidance: a scale under whatever name the base pipeline has for it. seed:
        of the first picture's noise. kwargs: arguments of the base pipeline, and parameters of the method.
        Raises ControlError for unknown names, words that are not in the source prompt, and bad pictures and masks.
        """
        target = target_prompt if target_prompt is not None else edited(source_prompt, edits)
        canvas = Canvas.of(image, _multiple(self.pipe))
        masks = [None if one.mask is None else canvas.mask(one.mask) for one in edits]
        placed = [
            replace(one, mask=None if m is None else canvas.padded_mask(m)) for one, m in zip(edits, masks, strict=True)
        ]
        if mask is not None:
            whole: Image.Image | None = canvas.mask(mask)
        else:
            known = [m for m in masks if m is not None]
            whole = reduce(ImageChops.lighter, known) if known and len(known) == len(edits) else None
        accepted = inspect.signature(type(self.pipe).__call__).parameters
        options = {name: value for name, value in kwargs.items() if name in accepted}
        overrides = {name: value for name, value in kwargs.items() if name not in accepted}
        regions = [Region(one.target, mask=one.mask) for one in placed if one.mask is not None and one.target]
        if whole is not None and len(regions) < len(placed or [target]):
            regions = [Region(target, mask=canvas.padded_mask(whole))]
        # The source has none: its prompt does not hold the words of the edits.
        subject = {"edits": tuple(placed), "regions": [[], regions], "source": canvas.padded}
        controls = make_controls(method, "editing", subject, overrides)
        pipe = share(self.pipe)
        prompts = [source_prompt, target]
        job = Job(pipe, canvas.padded, prompts, num_images_per_prompt, num_inference_steps, seed, options)
        start = _inverted(inversion, job)
        blend = [] if whole is None else [SourceBlend(canvas.padded_mask(whole))]
        arguments: dict[str, Any] = {
            **options,
            **start.call,
            "num_inference_steps": num_inference_steps,
            "num_images_per_prompt": num_images_per_prompt,
            "height": canvas.padded.height,
            "width": canvas.padded.width,
            "generator": job.generators(),
        }
        if start.latents is not None:
            arguments["latents"] = start.latents
        with control(pipe, *controls, *start.controls, *blend, record=record) as run:
            drawn = pipe(**call_arguments(pipe, prompts, guidance, arguments)).images
        finished = [canvas.finish(one, whole if composite else None, feather) for one in drawn[num_images_per_prompt:]]
        return EditResult(finished, canvas.finish(drawn[0], None, 0), target, run)


def _inverted(name: str, job: Job) -> Any:
    with torch.no_grad():
        return inversion(name)(job)


def _multiple(pipe: Any) -> int:
    """Pictures of this pipeline have sides of whole multiples of so many pixels."""
    # FLUX's and QwenImage's image processors count the packing of 2x2 latents, Stable Diffusion 3's its patches not.
    packed = int(pipe.image_processor.config.get("vae_scale_factor", 8))
    return math.lcm(packed, int(pipe.vae_scale_factor) * int(getattr(pipe, "patch_size", 1)))
