"""The rows of `bench edit`: how pictures are edited, as written on the command line."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from attnctrl.bench.draw import Settings
from attnctrl.bench.edit_tasks import EditTask
from attnctrl.bench.methods import Spec, parse_methods, split_list
from attnctrl.errors import ControlError
from attnctrl.inversion import INVERSIONS, inversion
from attnctrl.models import call_arguments

FLOORS = ("regenerate", "img2img", "inpaint:mask")
"""The edited prompt drawn from the same seed; from the noised picture; and anew inside the mask."""
STRENGTH = 0.7
_FLOOR = re.compile(r"img2img\{strength=([^}]*)\}")


@dataclass(frozen=True)
class Way:
    """One row. inversion: None for the floors, which have no source branch, and for instructions.

    strength: of img2img, the part of the run that is drawn, in (0, 1].
    """

    label: str
    spec: Spec | None
    inversion: str | None
    masked: bool
    strength: float = STRENGTH


def parse_ways(text: str) -> list[Way]:
    """The rows of a comma-separated list: a floor, or methods as `bench layout` writes them, @INVERSION, and :mask.

    img2img may have a strength, or several: img2img{strength=0.5|0.7}. Raises ControlError for what is not known.
    """
    ways = []
    for item in split_list(text):
        if item in FLOORS:
            ways.append(Way(item, None, None, item.endswith(":mask")))
            continue
        if floor := _FLOOR.fullmatch(item):
            values = floor[1].split("|")
            ways += [Way(f"img2img{{strength={v}}}", None, None, False, _strength(v, item)) for v in values]
            continue
        named, masked = _masked(item)
        methods, at, name = named.rpartition("@")
        if not at:
            known = ", ".join(INVERSIONS)
            raise ControlError(f'"{item}" names no inversion: write method@inversion, with one of {known}.')
        inversion(name)
        for spec in parse_methods(methods):
            ways.append(Way(f"{spec.label}@{name}{':mask' if masked else ''}", spec, name, masked))
    return ways


def parse_instruct_ways(text: str) -> list[Way]:
    """The rows of a comma-separated list for an instruction-following pipeline: methods, and :mask.

    Raises ControlError for names that are not known.
    """
    ways = []
    for item in split_list(text):
        named, masked = _masked(item)
        ways += [Way(f"{spec.label}{':mask' if masked else ''}", spec, None, masked) for spec in parse_methods(named)]
    return ways


def _masked(item: str) -> tuple[str, bool]:
    rest, colon, mask = item.rpartition(":")
    return (rest, True) if colon and mask == "mask" else (item, False)


def _strength(text: str, item: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ControlError(f'the strength "{text}" of "{item}" is no part of the run: give a number in (0, 1].')
    return value


def floor(pipe: Any, task: EditTask, way: Way, settings: Settings) -> Image.Image:
    """The picture of a way that edits nothing: it draws the edited prompt."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    given: dict[str, Any] = {
        "num_inference_steps": settings.steps,
        "generator": torch.Generator().manual_seed(task.seed),
    }
    if way.label == "regenerate":
        return pipe(**call_arguments(pipe, task.target_prompt, settings.guidance, given)).images[0]
    maker = AutoPipelineForInpainting if way.masked else AutoPipelineForImage2Image
    other = maker.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    given |= {"image": task.picture, "strength": 1.0 if way.masked else way.strength}
    if way.masked:
        given["mask_image"] = Image.fromarray(task.mask)
    if "height" in inspect.signature(type(other).__call__).parameters:
        # A pipeline that is made from another takes its class's size for its own, which FLUX's would be 1024.
        given |= {"height": task.picture.height, "width": task.picture.width}
    return other(**call_arguments(other, task.target_prompt, settings.guidance, given)).images[0]
