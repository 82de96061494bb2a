"""A detector of the shapes world that learns nothing: colours by nearest palette entry, shapes by template."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .components import Mask, components, dilate, erode
from .world import COLOURS, GROUND, HALF_EXTENT, PALETTE, SHAPES

Array = NDArray[np.float32]
Index = NDArray[np.intp]
Box = tuple[float, float, float, float]

MIN_AREA = 0.003
"""Specks smaller than this share of the image are no objects; the smallest object of the world has 0.008."""

_GRID = 32
_ASPECT_WEIGHT = 0.7
_COLOURS = np.array([PALETTE[c] for c in COLOURS], dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Found:
    """One object in an image; lengths are fractions of the image side, y runs down.

    Attributes:
        shape, colour: nearest of the world's, always filled in.
        box: (x0, y0, x1, y1) of the pixels more than half covered.
        centre: (x, y) of the box's middle.
        mask: (h, w) bool, pixels more than half covered.
        score: 0..1, overlap with the ideal shape; clean shapes score over 0.85, blobs much lower.
    """

    shape: str
    colour: str
    box: Box
    centre: tuple[float, float]
    mask: Mask = field(repr=False)
    score: float


@dataclass(frozen=True, eq=False)
class Detection:
    """All objects of an image, largest first, and its background's name."""

    objects: list[Found]
    background: str


def to_array(image: Any) -> Array:
    """A PIL image, tensor or array as (h, w, 3) float32 in 0..1.

    Args:
        image: PIL image; or torch tensor or numpy array, (3, h, w) or (h, w, 3), floats in 0..1 or uint8.

    Raises:
        ValueError: not a three-channel image.
    """
    if hasattr(image, "convert"):
        image = np.asarray(image.convert("RGB"))
    elif hasattr(image, "detach"):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    array = np.asarray(image)
    if array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]):
        raise ValueError(f"expected one image (3, h, w) or (h, w, 3), got shape {array.shape}")
    if array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    scale = 255.0 if array.dtype == np.uint8 else 1.0
    return np.ascontiguousarray(array, dtype=np.float32) / np.float32(scale)


def fit_ground(pixels: Array) -> tuple[Array, str]:
    """The background as a plane per channel (h, w, 3), fitted to the pixels like the border's, and its name."""
    height, width, _ = pixels.shape
    edge = max(2, height // 24)
    border = np.concatenate([
        pixels[:edge].reshape(-1, 3), pixels[-edge:].reshape(-1, 3),
        pixels[:, :edge].reshape(-1, 3), pixels[:, -edge:].reshape(-1, 3),
    ])  # fmt: skip
    middle = np.median(border, axis=0)
    name = min(GROUND, key=lambda g: float(np.abs(middle - np.array(GROUND[g])).sum()))
    near = (np.abs(pixels - middle) < 0.1).all(axis=2)
    y, x = np.nonzero(near)
    if len(y) < 16:
        return np.broadcast_to(middle.astype(np.float32), pixels.shape), name
    v, u = y / height - 0.5, x / width - 0.5
    design = np.stack([np.ones_like(u), u, v], axis=1)
    plane = np.linalg.solve(design.T @ design + 1e-6 * np.eye(3), design.T @ pixels[y, x])
    rows, columns = np.arange(height) / height - 0.5, np.arange(width) / width - 0.5
    fitted = plane[0] + columns[None, :, None] * plane[1] + rows[:, None, None] * plane[2]
    return fitted.astype(np.float32), name


def detect(image: Any) -> Detection:
    """Find the world's shapes in an image.

    A pixel belongs to the background or to the nearest palette colour; each colour's pixels are opened (which
    removes the mixed colours along edges) and split into components; a component's exact extent is then where the
    image is more than halfway from the background to its colour; its shape is the template that overlaps best once
    both are stretched to their bounding boxes, discounted for a bounding box of other proportions.

    Args:
        image: see `to_array`; any size, made for 64 to 512 pixels.

    Raises:
        ValueError: not a three-channel image.
    """
    pixels = to_array(image)
    ground, background = fit_ground(pixels)
    to_ground = np.square(pixels - ground).sum(axis=2)
    # |pixel - colour|^2 expanded, so that it is one matrix product
    distance = np.square(pixels).sum(axis=2)[:, :, None] - 2 * pixels @ _COLOURS.T + np.square(_COLOURS).sum(axis=1)
    label = np.where(distance.min(axis=2) < to_ground, distance.argmin(axis=2), -1)
    unit = max(1, round(pixels.shape[0] / 128))
    cores = []
    for colour in range(len(COLOURS)):
        mask = label == colour
        if mask.mean() < MIN_AREA / 2:
            continue
        mask = dilate(erode(mask, unit), unit) & mask
        cores += [(colour, y, x) for y, x in components(mask) if len(y) >= MIN_AREA / 2 * mask.size]
    cores.sort(key=lambda core: -len(core[1]))

    objects: list[Found] = []
    claimed = np.zeros(label.shape, dtype=bool)
    for colour, y, x in cores:
        if claimed[y, x].mean() > 0.6:
            continue  # the mixed-colour fringe of something larger
        mask = _extent(pixels, ground, _COLOURS[colour], y, x, unit) & ~claimed
        if mask.mean() >= MIN_AREA:
            claimed |= dilate(mask, 2 * unit)
            objects.append(_describe(mask, COLOURS[colour]))
    return Detection(objects, background)


def _extent(pixels: Array, ground: Array, colour: Array, y: Index, x: Index, unit: int) -> Mask:
    """Pixels around the core (y, x) that are more than halfway from the ground to the core's own colour."""
    pad = 4 * unit
    top, left = max(y.min() - pad, 0), max(x.min() - pad, 0)
    window = np.s_[top : y.max() + pad + 1, left : x.max() + pad + 1]
    near, under = pixels[window], ground[window]
    core = np.zeros(near.shape[:2], dtype=bool)
    core[y - top, x - left] = True
    inside = erode(core, unit)
    own = np.median(near[inside], axis=0) if inside.sum() > 20 else colour
    direction = own - under
    share = ((near - under) * direction).sum(axis=2) / np.square(direction).sum(axis=2)
    astray = np.square(near - under - share[:, :, None] * direction).sum(axis=2)
    mask = (share > 0.5) & (astray < 0.1) & dilate(core, 3 * unit)
    out = np.zeros(pixels.shape[:2], dtype=bool)
    for rows, columns in components(mask)[:1]:
        out[rows + top, columns + left] = True
    return out


@lru_cache
def _templates() -> tuple[Array, Array]:
    """Each shape stretched over its bounding box (8, grid, grid) in 0..1, and log(width / height) (8,)."""
    import torch

    from .render import signed_distance

    fine = 4 * _GRID
    ticks = (torch.arange(fine) + 0.5) / fine * 2 - 1
    v, u = torch.meshgrid(ticks, ticks, indexing="ij")
    shapes = []
    for shape in SHAPES:
        half_w, half_h = HALF_EXTENT[shape]
        inside = (signed_distance(shape, u * half_w, v * half_h) < 0).float()
        shapes.append(inside.reshape(_GRID, 4, _GRID, 4).mean((1, 3)).numpy())
    aspects = np.log(np.array([HALF_EXTENT[s][0] / HALF_EXTENT[s][1] for s in SHAPES], dtype=np.float32))
    return np.stack(shapes), aspects


def _describe(mask: Mask, colour: str) -> Found:
    height, width = mask.shape
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    templates, aspects = _templates()
    seen = _stretch(mask[y0:y1, x0:x1].astype(np.float32))
    low, high = np.minimum(templates, seen).sum(axis=(1, 2)), np.maximum(templates, seen).sum(axis=(1, 2))
    aspect = np.log((x1 - x0) / (y1 - y0))
    scores = low / high * np.exp(-_ASPECT_WEIGHT * np.abs(aspect - aspects))
    best = int(scores.argmax())
    box = (float(x0 / width), float(y0 / height), float(x1 / width), float(y1 / height))
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    return Found(SHAPES[best], colour, box, centre, mask, float(scores[best]))


def _stretch(patch: Array) -> Array:
    """A patch (h, w) resampled to the template grid by linear interpolation."""
    for axis in (0, 1):
        count = patch.shape[axis]
        position = np.clip((np.arange(_GRID) + 0.5) / _GRID * count - 0.5, 0, count - 1)
        below = np.minimum(position.astype(int), max(count - 2, 0))
        part = (position - below).astype(np.float32)
        part = part[:, None] if axis == 0 else part[None, :]
        above = np.minimum(below + 1, count - 1)
        patch = np.take(patch, below, axis) * (1 - part) + np.take(patch, above, axis) * part
    return patch
