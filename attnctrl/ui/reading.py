"""Reading of given pictures: masks of words, of parts like those of an example, and a point's counterpart."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from attnctrl.controls import method
from attnctrl.errors import ControlError
from attnctrl.fields import arguments
from attnctrl.install import share
from attnctrl.pictures import with_regions
from attnctrl.pipelines import ReadoutPipeline
from attnctrl.regions import Region
from attnctrl.ui.backend import Backend
from attnctrl.ui.given import check_sides, mask_of
from attnctrl.ui.jobs import Watch
from attnctrl.ui.request import Request
from attnctrl.ui.result import Pictures, Result

NEAR = 0.03
"""Half the side of the square that marks a point, as a fraction of the picture."""


def read(backend: Backend, request: Request, watch: Watch, pictures: Pictures = ()) -> Result:
    """The picture with what was looked for, and the one in which it was found; overlays are the masks.

    Raises ControlError for another number of methods than one, and where it lacks its picture, region or words.
    """
    check_reading(request)
    (name,) = request.methods
    wanted = 1 if name == "segment" else 2
    if len(pictures) != wanted:
        also = "" if wanted == 1 else ": the example and the one that is read"
        raise ControlError(f"{name} takes {wanted} picture{'s' * (wanted > 1)}, and {len(pictures)} are given{also}.")
    for picture in pictures:
        check_sides(picture)
    reader = ReadoutPipeline(share(backend.pipe), backend.callback(backend.pipe, watch, "reading"))
    about = about_reading(request)
    first, other = pictures[0].convert("RGB"), pictures[-1].convert("RGB")
    if name == "segment":
        segments = reader.segment(first, request.prompt, list(request.phrases) or None, **about)
        found = {phrase: segments.mask(phrase) for phrase in segments.phrases[0]}
        return _marked(first, first, [], found)
    if name == "correspond":
        point = center(request)
        there = reader.correspond(first, point, other, **about)
        text = f"({point[0]:.3f}, {point[1]:.3f}) is ({there[0]:.3f}, {there[1]:.3f}) in the other picture"
        return Result(with_regions(first, [_mark(point)]), with_regions(other, [_mark(there)]), report=text)
    parts = reader.learn(first, labels_of(request, first.size), **about)
    labels = reader.segment_like(other, parts, **about)[0].numpy()
    names = list(dict.fromkeys(place.phrase for place in request.regions))
    found = {n: Image.fromarray(np.uint8(255) * (labels == i + 1)) for i, n in enumerate(names)}
    return _marked(first, other, [place.region() for place in request.regions], found)


def about_reading(request: Request) -> dict[str, Any]:
    """What the request gives to the method of its reading: steps, seed, window and whatever else was set."""
    ((name, given),) = request.methods.items()
    params = arguments(name, given, {}, {})
    # Said in any case: the pipeline has a default of its own, and the form shows the method's.
    window: Any = method(name).control.__dataclass_fields__["window"].default
    return {"window": window, "steps": request.steps, "seed": request.seed, **params}


def check_reading(request: Request) -> None:
    """Raises ControlError where the one method of the request lacks what it reads."""
    if len(request.methods) != 1:
        raise ControlError("reading takes one method: choose segment, segment-like-me or correspond.")
    (name,) = request.methods
    if name != "segment" and not request.regions:
        what = "the point that is looked for" if name == "correspond" else "each part that is looked for"
        raise ControlError(f"{name} needs a region around {what}: draw it in the first picture.")


def center(request: Request) -> tuple[float, float]:
    """(x, y) of the middle of the first region: what `correspond` looks for."""
    place = request.regions[0]
    points = place.polygon or ((place.box or ())[:2], (place.box or ())[2:])
    (x0, x1), (y0, y1) = ((min(side), max(side)) for side in zip(*points, strict=True))
    return (x0 + x1) / 2, (y0 + y1) / 2


def labels_of(request: Request, size: tuple[int, int]) -> np.ndarray:
    """(height, width) integers: 0 where no region is, else the number of the phrase of the last region there."""
    labels = np.zeros((size[1], size[0]), dtype=np.int64)
    names = list(dict.fromkeys(place.phrase for place in request.regions))
    for place in request.regions:
        labels[np.asarray(mask_of(place.region(), size)) > 0] = names.index(place.phrase) + 1
    return labels


def _mark(point: tuple[float, float]) -> Region:
    x, y = (min(max(v, NEAR), 1 - NEAR) for v in point)
    return Region("here", box=(x - NEAR, y - NEAR, x + NEAR, y + NEAR))


def _marked(first: Image.Image, other: Image.Image, shown: list[Region], found: dict[str, Image.Image]) -> Result:
    """What was found as outlines, and as masks; what covers nothing has neither outline nor mask."""
    kept = {phrase: mask for phrase, mask in found.items() if mask.getbbox() is not None}
    outlined = with_regions(other, [Region(phrase, mask=mask) for phrase, mask in kept.items()])
    missing = [phrase for phrase in found if phrase not in kept]
    report = "".join(f'nothing was found of "{phrase}"\n' for phrase in missing)
    for phrase, mask in kept.items():
        report += f"{phrase}: {np.asarray(mask).mean() / 255:.1%} of the picture\n"
    return Result(with_regions(first, shown), outlined, [(mask, phrase) for phrase, mask in kept.items()], report)
