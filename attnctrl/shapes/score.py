"""How well an image does what a prompt (and a layout) asked, given what the detector found. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .detect import Box, Detection, Found
from .world import HALF_EXTENT

Asked = Sequence[tuple[str, str]]
"""(shape, colour) of every object asked for, in order."""


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1), 0..1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def inscribed_box(shape: str, box: Box) -> Box:
    """The bounding box of the largest `shape` inside `box`, centred there.

    Shapes have fixed proportions (a diamond is 0.75 as wide as high), so a perfect object fills its box in one
    direction only.
    """
    half_w, half_h = HALF_EXTENT[shape]
    r = min((box[2] - box[0]) / (2 * half_w), (box[3] - box[1]) / (2 * half_h))
    cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return cx - half_w * r, cy - half_h * r, cx + half_w * r, cy + half_h * r


def contains(box: Box, point: tuple[float, float]) -> bool:
    """Whether a point (x, y) lies in a box, edges included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def match(asked: Asked, detection: Detection, boxes: Sequence[Box] | None = None) -> list[Found | None]:
    """For each asked object the found one with its shape and colour, each found one used at most once.

    Where several found objects would do, those nearest to the asked boxes are taken first (without boxes: those
    that look most like the shape).

    Raises:
        ValueError: boxes are given and are not one per asked object.
    """
    if boxes is not None and len(boxes) != len(asked):
        raise ValueError(f"{len(boxes)} boxes for {len(asked)} asked objects")
    candidates = []
    for i, (shape, colour) in enumerate(asked):
        for j, found in enumerate(detection.objects):
            if (found.shape, found.colour) != (shape, colour):
                continue
            if boxes is None:
                cost = -found.score
            else:
                x, y = (boxes[i][0] + boxes[i][2]) / 2, (boxes[i][1] + boxes[i][3]) / 2
                cost = (found.centre[0] - x) ** 2 + (found.centre[1] - y) ** 2
            candidates.append((cost, i, j))
    result: list[Found | None] = [None] * len(asked)
    used: set[int] = set()
    for _, i, j in sorted(candidates):
        if result[i] is None and j not in used:
            result[i] = detection.objects[j]
            used.add(j)
    return result


def present(asked: Asked, detection: Detection) -> float:
    """Share of asked objects found with the right shape and colour, matched one to one; 1 if nothing was asked."""
    if not asked:
        return 1.0
    return sum(found is not None for found in match(asked, detection)) / len(asked)


def extra(asked: Asked, detection: Detection) -> int:
    """How many objects were found that match nothing asked: duplicates, strangers, wrongly coloured ones."""
    return len(detection.objects) - sum(found is not None for found in match(asked, detection))


def bound(asked: Asked, detection: Detection) -> bool:
    """Every asked object is there with its own colour, and nothing that was not asked is."""
    return present(asked, detection) == 1 and extra(asked, detection) == 0


def in_box(asked: Asked, boxes: Sequence[Box], detection: Detection) -> float:
    """Share of asked objects found with the right shape and colour and with their centre inside their box."""
    if not asked:
        return 1.0
    found = match(asked, detection, boxes)
    return sum(f is not None and contains(b, f.centre) for f, b in zip(found, boxes, strict=True)) / len(asked)


def iou(asked: Asked, boxes: Sequence[Box], detection: Detection) -> float:
    """Mean over asked objects of the IoU between the found bounding box and the asked box; 0 where none is found.

    The asked box is taken as given, as layout-to-image papers do. An object of fixed proportions cannot fill every
    box, so a perfect result is usually below 1; `fitted_iou` divides that out.
    """
    return _mean_iou(asked, boxes, boxes, detection)


def fitted_iou(asked: Asked, boxes: Sequence[Box], detection: Detection) -> float:
    """As `iou`, but against `inscribed_box`: 1 means the largest undistorted shape the box holds, centred in it."""
    targets = [inscribed_box(shape, box) for (shape, _), box in zip(asked, boxes, strict=True)]
    return _mean_iou(asked, boxes, targets, detection)


def _mean_iou(asked: Asked, boxes: Sequence[Box], targets: Sequence[Box], detection: Detection) -> float:
    if not asked:
        return 1.0
    found = match(asked, detection, boxes)
    return sum(box_iou(f.box, t) for f, t in zip(found, targets, strict=True) if f is not None) / len(asked)


def neglected(asked: Asked, detection: Detection) -> float:
    """Share of asked objects of which neither the shape nor the colour occurs in the image."""
    shapes, colours = {f.shape for f in detection.objects}, {f.colour for f in detection.objects}
    return sum(s not in shapes and c not in colours for s, c in asked) / max(1, len(asked))


def leaked(asked: Asked, detection: Detection) -> float:
    """Share of asked objects whose shape occurs in a colour that only another object was asked to have."""
    found = {(f.shape, f.colour) for f in detection.objects} - set(asked)
    colours = {c for _, c in asked}
    return sum(any((s, c) in found for c in colours) for s, _ in asked) / max(1, len(asked))


@dataclass(frozen=True)
class Score:
    """All measures of one image; see the functions of the same names. The box measures are None without boxes."""

    present: float
    bound: bool
    extra: int
    neglected: float
    leaked: float
    background: bool | None
    in_box: float | None = None
    iou: float | None = None
    fitted_iou: float | None = None


def score_image(
    asked: Asked, detection: Detection, boxes: Sequence[Box] | None = None, background: str | None = None
) -> Score:
    """Every measure of one image.

    Args:
        asked: (shape, colour) of each object asked for.
        detection: what `detect` found.
        boxes: one (x0, y0, x1, y1) per asked object, or None when no layout was asked for.
        background: the asked background, or None when it was left open.
    """
    return Score(
        present=present(asked, detection),
        bound=bound(asked, detection),
        extra=extra(asked, detection),
        neglected=neglected(asked, detection),
        leaked=leaked(asked, detection),
        background=None if background is None else background == detection.background,
        in_box=None if boxes is None else in_box(asked, boxes, detection),
        iou=None if boxes is None else iou(asked, boxes, detection),
        fitted_iou=None if boxes is None else fitted_iou(asked, boxes, detection),
    )
