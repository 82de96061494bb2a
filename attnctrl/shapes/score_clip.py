"""How well a clip shows what a prompt asked, given what the detector found in each of its frames. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .detect import Detection, Found
from .motion import MOTIONS, OPPOSITE

Moving = Sequence[tuple[str, str, str]]
"""(shape, colour, motion) of every object asked for, in order."""

Track = list[Found | None]
"""What shows one object in each frame, None where nothing does."""

MOVES = 0.1
"""Share of the image side that an object has to go from the first frame to the last to count as moving."""


def follow(asked: Moving, detections: Sequence[Detection]) -> list[Track]:
    """A track for each asked object: of the found objects of its colour, at most one a frame, each used at most once.

    Within a frame, objects of the right shape are taken before others, and then those near to where the object was
    seen last. So an object that loses its shape for a frame is followed, and one that loses its colour is not.
    """
    tracks: list[Track] = [[] for _ in asked]
    last: list[Found | None] = [None] * len(asked)
    for detection in detections:
        candidates = []
        for i, (shape, colour, _) in enumerate(asked):
            for j, found in enumerate(detection.objects):
                if found.colour == colour:
                    candidates.append((found.shape != shape, _distance(last[i], found), i, j))
        here: list[Found | None] = [None] * len(asked)
        used: set[int] = set()
        for _, _, i, j in sorted(candidates):
            if here[i] is None and j not in used:
                here[i] = detection.objects[j]
                used.add(j)
        for i, found_here in enumerate(here):
            tracks[i].append(found_here)
            last[i] = found_here or last[i]
    return tracks


def _distance(last: Found | None, found: Found) -> float:
    """From where an object was; without that, objects that look most like their shape come first."""
    if last is None:
        return -found.score
    return float(np.hypot(last.centre[0] - found.centre[0], last.centre[1] - found.centre[1]))


def kept(track: Track, shape: str) -> float:
    """Share of the frames that show the object with its shape and its colour."""
    return sum(found is not None and found.shape == shape for found in track) / len(track)


def colour_kept(track: Track) -> float:
    """Share of the frames that show something of the object's colour."""
    return sum(found is not None for found in track) / len(track)


def line(track: Track) -> tuple[np.ndarray, np.ndarray] | None:
    """The straight line through an object's centres by least squares, over time from 0 (first frame) to 1 (last).

    Returns:
        (way, rest): the way it makes in that time, (2,) in x and y; the centres' distances from the line, (seen, 2);
        lengths in fractions of the image side. None when fewer than half of the frames, or than two, show it.
    """
    times = np.array([i for i, found in enumerate(track) if found is not None], dtype=np.float64)
    if len(times) < max(2, len(track) / 2):
        return None
    centres = np.array([found.centre for found in track if found is not None])
    times = times / (len(track) - 1) - 0.5
    design = np.stack([times, np.ones_like(times)], axis=1)
    fitted, *_ = np.linalg.lstsq(design, centres, rcond=None)
    return fitted[0], centres - design @ fitted


def motion(track: Track) -> str | None:
    """The motion that a track shows, of `MOTIONS`: along the axis on which it goes farther, or "still".

    An object that goes less than `MOVES` from the first frame to the last stands still. None as for `line`.
    """
    along = line(track)
    if along is None:
        return None
    x, y = along[0]
    if np.hypot(x, y) < MOVES:
        return "still"
    direction = (int(np.sign(x)), 0) if abs(x) >= abs(y) else (0, int(np.sign(y)))
    return next(name for name, way in MOTIONS.items() if way == direction)


def jitter(track: Track) -> float | None:
    """Root mean square distance of the centres from the line, in fractions of the image side; None as for `line`.

    A thing that moves evenly has none, however fast it is; in rendered clips whole pixels leave about 0.002.
    """
    along = line(track)
    return None if along is None else float(np.sqrt(np.square(along[1]).sum(axis=1).mean()))


@dataclass(frozen=True)
class ClipScore:
    """All measures of one clip.

    Attributes:
        kept: mean over the asked objects of `kept`, 0 to 1.
        colour_kept: likewise of `colour_kept`.
        moving: share of the asked objects that move as asked; one that too few frames show does not.
        axis: likewise, of those that go as asked or the opposite way.
        jitter: mean of `jitter` over the objects that have one, or None.
        extra: found objects a frame that belong to nothing asked.
        background: share of the frames with the asked background, or None when it was left open.
    """

    kept: float
    colour_kept: float
    moving: float
    axis: float
    jitter: float | None
    extra: float
    background: float | None


def score_clip(asked: Moving, detections: Sequence[Detection], background: str | None = None) -> ClipScore:
    """Every measure of one clip.

    Args:
        asked: (shape, colour, motion) of each object asked for.
        detections: what `detect` found in each frame, two frames at least.
        background: the asked background, or None when it was left open.

    Raises:
        ValueError: nothing was asked for, or there are fewer than two frames.
    """
    if not asked or len(detections) < 2:
        raise ValueError(f"a clip's score needs an asked object and two frames, got {len(asked)}, {len(detections)}")
    tracks = follow(asked, detections)
    shakes = [shake for track in tracks if (shake := jitter(track)) is not None]
    right = sum(sum(found is not None for found in track) for track in tracks)
    total = sum(len(detection.objects) for detection in detections)
    motions = [(motion(track), way) for track, (_, _, way) in zip(tracks, asked, strict=True)]
    return ClipScore(
        kept=float(np.mean([kept(track, shape) for track, (shape, _, _) in zip(tracks, asked, strict=True)])),
        colour_kept=float(np.mean([colour_kept(track) for track in tracks])),
        moving=float(np.mean([found == way for found, way in motions])),
        axis=float(np.mean([found in (way, OPPOSITE[way]) for found, way in motions])),
        jitter=float(np.mean(shakes)) if shakes else None,
        extra=(total - right) / len(detections),
        background=None if background is None else float(np.mean([d.background == background for d in detections])),
    )
