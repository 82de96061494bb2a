"""Requests about given pictures: what they must hold, and their regions as masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from attnctrl.controls import method
from attnctrl.errors import ControlError
from attnctrl.regions import Region
from attnctrl.ui.request import SIDE, Request

ELSEWHERE = {
    "prime-composer": "takes a second picture, which this page has no field for: use attnctrl.pipelines.EditPipeline",
    "focus-on-instruction": "follows an instruction on InstructPix2Pix: use attnctrl.pipelines.InstructPipeline",
    "lime": "follows an instruction on InstructPix2Pix: use attnctrl.pipelines.InstructPipeline",
}
"""Editing methods that no page can give what they need, and where it can be given."""


def check_edit(request: Request) -> None:
    """Raises ControlError where a method of an edit lacks what it is about, or nothing takes what is given."""
    for name in request.methods:
        if name in ELSEWHERE:
            raise ControlError(f"{name} {ELSEWHERE[name]}.")
        settings = method(name).settings
        if "regions" in settings and not request.regions:
            raise ControlError(f"{name} keeps to regions: draw one and tie it to the words of a change.")
        if "layers" in settings and not request.moves:
            raise ControlError(
                f'{name} moves objects: draw a region and write what becomes of it, "red circle = 0.3, 0".'
            )
    if request.moves and not any("layers" in method(name).settings for name in request.methods):
        raise ControlError("objects are moved by design-edit: choose it among the methods.")


def check_sides(picture: Image.Image) -> None:
    """Raises ControlError for pictures that are too large to be drawn."""
    if max(picture.size) > SIDE:
        raise ControlError(
            f"the picture is {picture.width}x{picture.height} pixels: give one of at most {SIDE} on a side."
        )


def masks_of(request: Request, size: tuple[int, int]) -> dict[str, Image.Image]:
    """The regions of an edit as masks, by their words in lower case.

    Raises ControlError for a region that nothing is about, and for a move without a region.
    """
    known = [words for words, _ in request.edits] + [one.phrase for one in request.moves]
    regions = placed(request, known, "which no edit changes: its phrase is words of an edit")
    for one in request.moves:
        if one.phrase.lower() not in regions:
            raise ControlError(f'there is no region for "{one.phrase}", which is to move: draw one and tie it.')
    return {words: mask_of(region, size) for words, region in regions.items()}


def placed(request: Request, known: Sequence[str], why: str) -> dict[str, Region]:
    """The request's regions by their phrase in lower case.

    Raises ControlError for two of one phrase, and, saying why, for one whose phrase is not among the known.
    """
    names, found = [one.lower() for one in known], {}  # type: list[str], dict[str, Region]
    for place in request.regions:
        words = place.phrase.lower()
        if words not in names:
            raise ControlError(f'a region is for "{words}", {why}.')
        if words in found:
            raise ControlError(f'there are two regions for "{words}": draw one.')
        found[words] = place.region()
    return found


def mask_of(region: Region, size: tuple[int, int]) -> Image.Image:
    """A region as a mask of `size` (width, height), white inside."""
    inside = region.raster(size[1], size[0], "nearest")
    return Image.fromarray((inside.numpy() * 255).astype(np.uint8))
