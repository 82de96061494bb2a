"""How well a picture was edited: what should change has, and nothing else. Pure functions of pictures."""

from __future__ import annotations

import numpy as np

from attnctrl.bench.edit_tasks import SIDE, EditTask
from attnctrl.bench.likeness import psnr
from attnctrl.shapes.detect import Detection, Found, detect
from attnctrl.shapes.score import contains
from attnctrl.shapes.world import GROUND, PALETTE

NEAR = 0.06
"""How far, in sides of the picture, the centre of an object that stays may move."""
MARGIN = 6
"""Pixels around what may change that are not counted as background: the edge that is blended."""


def standing(found: Detection, shape: str, colour: str, box: tuple[float, float, float, float]) -> Found | None:
    """The object of this shape and colour whose centre lies in the box."""
    alike = (o for o in found.objects if (o.shape, o.colour) == (shape, colour))
    return next((o for o in alike if contains(box, o.centre)), None)


def edited_share(task: EditTask, found: Detection) -> float:
    """Share of the edits that came out: the new object in the old one's box, nothing there, or the background.

    An object that is moved stands in its new box, its centre NEAR the box's, and nothing in its old one.
    """
    if task.kind == "background":
        return float(found.background == task.background)
    done = []
    for i in task.changed:
        box, wanted = task.layout.boxes[i], task.wanted[i]
        if wanted is None:
            done.append(not any(contains(box, o.centre) for o in found.objects))
        elif i in task.moved:
            there = _apart(standing(found, *wanted, task.moved[i]), task.moved[i])
            done.append(there <= NEAR and not any(contains(box, o.centre) for o in found.objects))
        else:
            done.append(standing(found, *wanted, box) is not None)
    return sum(done) / len(done)


def kept_share(task: EditTask, found: Detection) -> float:
    """Share of what was to stay that did: objects with shape, colour and place, and the background."""
    stays = [i for i in range(len(task.wanted)) if i not in task.changed]
    kept = []
    for i in stays:
        shape, colour, box = task.layout.things[i]
        kept.append(_apart(standing(found, shape, colour, box), box) <= NEAR)
    if task.kind != "background":
        kept.append(found.background == task.layout.background)
    return sum(kept) / len(kept) if kept else 1.0


def _apart(one: Found | None, box: tuple[float, float, float, float]) -> float:
    """How far an object's centre is from that of its box, in sides of the picture; infinite without an object."""
    if one is None:
        return float("inf")
    x0, y0, x1, y1 = box
    return float(np.hypot(one.centre[0] - (x0 + x1) / 2, one.centre[1] - (y0 + y1) / 2))


def toward(pixels: np.ndarray, before: np.ndarray, colour: str, where: np.ndarray) -> float:
    """Share of the pixels of a mask that came nearer to a colour by more than 0.15 in RGB distance."""
    hue = np.array(PALETTE[colour])
    nearer = np.linalg.norm(before - hue, axis=-1) - np.linalg.norm(pixels - hue, axis=-1)
    return float((nearer[where] > 0.15).mean()) if where.any() else 0.0


def coloured(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Which pixels have a colour, bool (h, w): it is the world's nearest to them, within 0.15 in RGB distance."""
    world = {**PALETTE, **GROUND}
    apart = np.stack([np.linalg.norm(pixels - np.array(one), axis=-1) for one in world.values()])
    own = list(world).index(colour)
    return (apart.argmin(axis=0) == own) & (apart[own] < 0.15)


def spilled(pixels: np.ndarray, before: np.ndarray, colour: str, where: np.ndarray) -> float:
    """Share of the pixels of a mask that have a colour which they did not have."""
    return float((coloured(pixels, colour) & ~coloured(before, colour))[where].mean())


def score_edit(task: EditTask, picture: np.ndarray) -> dict[str, float]:
    """Every measure of one edited picture (128, 128, 3) in 0..1.

    edited, kept: see above. background_psnr, max_error: against the given picture, MARGIN pixels away from all that may
    change. leak_out: share of these pixels that came nearer to a new colour (after TELS of ALE-Bench); leak_in: share
    of the pixels inside each edit's mask that got another edit's colour (after TILS), of several edits at once.
    """
    found, before = detect(picture), np.asarray(task.picture, dtype=np.float64) / 255
    outside = ~grown(task.mask > 0, MARGIN)
    scores = {
        "edited": edited_share(task, found),
        "kept": kept_share(task, found),
        "background_psnr": psnr(picture, before, outside),
        "max_error": float(np.abs(picture - before)[outside].max()),
    }
    colours = {i: w[1] for i in task.changed if (w := task.wanted[i]) is not None}
    if colours and task.edits:
        scores["leak_out"] = float(np.mean([toward(picture, before, c, outside) for c in colours.values()]))
        pairs = [(i, c) for i in colours for j, c in colours.items() if i != j]
        masks = {i: edit.mask > 0 for i, edit in zip(task.order, task.edits, strict=True)}
        if pairs:
            scores["leak_in"] = float(np.mean([spilled(picture, before, c, masks[i]) for i, c in pairs]))
    return scores


def grown(mask: np.ndarray, margin: int) -> np.ndarray:
    """A bool mask (128, 128) grown by `margin` pixels in every direction."""
    padded = np.pad(mask, margin)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * margin + 1, 2 * margin + 1))
    return windows.any(axis=(-1, -2)).reshape(SIDE, SIDE)
