"""A picture and the wanted change in, the changed picture out."""

from __future__ import annotations

import inspect
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
from attnctrl.controls.editing.sources import Retracing
from attnctrl.edits import Edit, edited
from attnctrl.errors import ControlError
from attnctrl.install import share
from attnctrl.inversion import Job, Start, ddim_trajectory
from attnctrl.inversion import inversion as inversion_named
from attnctrl.layers import Layer, footprint
from attnctrl.models import call_arguments, check_area, load_pipeline, side_multiple
from attnctrl.pipelines.methods import Methods, make_controls
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
        layers: Sequence[Layer] = (),
        method: Methods = "prompt-to-prompt",
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

        image: a PIL picture or array of any mode and of up to 16 times the area that the model draws by itself; nothing
        is resized, sizes that are not whole latents are padded. source_prompt: what the picture shows. target_prompt:
        what the edited one shows, or `edits` of words of the source prompt, from which it is made. layers: objects
        that are moved, resized, flipped or removed, for methods that take them; the prompt stays unless another is
        given. method: a name from the registry, a control, several of them, names with the parameters of each, or
        "none" for the edited prompt alone. inversion: a name of `attnctrl.inversion.INVERSIONS`. mask: where the
        picture may change (by default the union of the edits' masks, if each has one, or the holes of the layers and
        their new places); outside it the latents are the source's and, with `composite`, the pixels are the given
        ones, byte for byte beyond `feather` pixels. guidance: a scale under whatever name the base pipeline has for
        it. seed: of the first picture's noise. kwargs: arguments of the base pipeline, and parameters of the method.
        Raises ControlError for unknown names, words that are not in the source prompt, and bad pictures and masks.
        """
        if target_prompt is None:
            target_prompt = source_prompt if layers and not edits else edited(source_prompt, edits)
        target = target_prompt
        canvas = Canvas.of(image, side_multiple(self.pipe))
        check_area(self.pipe, *canvas.picture.size)
        masks = [None if one.mask is None else canvas.mask(one.mask) for one in edits]
        placed = [
            replace(one, mask=None if m is None else canvas.padded_mask(m)) for one, m in zip(edits, masks, strict=True)
        ]
        moved = [_padded(layer, canvas) for layer in layers]
        if mask is not None:
            whole: Image.Image | None = canvas.mask(mask)
        elif moved:
            whole = footprint(moved, canvas.padded.size).crop((0, 0, *canvas.picture.size))
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
        subject: dict[str, Any] = {
            "edits": tuple(placed),
            "regions": [[], regions],
            "layers": tuple(moved),
            "source": canvas.padded,
        }
        controls = make_controls(method, "editing", subject, overrides)
        if not overrides:
            _refuse_idle(method, controls)
        pipe = share(self.pipe)
        prompts = [source_prompt, target]
        job = Job(pipe, canvas.padded, prompts, num_images_per_prompt, num_inference_steps, seed, options)
        with torch.no_grad():
            start = inversion_named(inversion)(job)
            controls = [_retraced(one, job, start, inversion) for one in controls]
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
        with control(pipe, *start.follow, *controls, *start.controls, *blend, record=record) as run:
            drawn = pipe(**call_arguments(pipe, prompts, guidance, arguments)).images
        finished = [canvas.finish(one, whole if composite else None, feather) for one in drawn[num_images_per_prompt:]]
        return EditResult(finished, canvas.finish(drawn[0], None, 0), target, run)


def _refuse_idle(method: Methods, controls: Sequence[Control]) -> None:
    """Raises ControlError where a method that was asked for by name alone has got nothing that it works on."""
    if isinstance(method, Mapping):
        names = {name for name, given in method.items() if not given}
    else:
        names = {one for one in ([method] if isinstance(method, str | Control) else method) if isinstance(one, str)}
    idle = {type(one) for one in controls if one.idle}
    for name in sorted(names & {*REGISTRY}):
        if REGISTRY[name].control in idle:
            raise ControlError(
                f'method "{name}" has nothing to do in this edit: `attnctrl methods` says what it works on, such as '
                "masks, layers or instructions."
            )


def _padded(layer: Layer, canvas: Canvas) -> Layer:
    """The layer for the padded picture."""
    across, down = (given / padded for given, padded in zip(canvas.picture.size, canvas.padded.size, strict=True))
    mask = canvas.padded_mask(canvas.mask(layer.mask))
    return replace(layer, mask=mask, dx=layer.dx * across, dy=layer.dy * down)


def _retraced(one: Control, job: Job, start: Start, name: str) -> Control:
    """The control with the trajectories that it needs and was not given."""
    if not isinstance(one, Retracing) or one.trajectories is not None or one.idle:
        return one
    pictures = one.pictures(job.image)
    if pictures and start.trajectory is None:
        raise ControlError(
            f'{one.name} needs trajectories of pictures, which inversion "{name}" does not make: use "direct", "ddim", '
            '"negative-prompt" or "null-text".'
        )
    found = [start.trajectory if p is job.image else ddim_trajectory(replace(job, image=p)) for p in pictures]
    changed: Any = one
    return replace(changed, trajectories=found) if found else one
