"""The shapes world in motion: clips of things that move in straight lines, drawn at random.

As in still scenes, lengths are fractions of the image side, x runs to the right and y downwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from .world import BACKGROUNDS, MARGIN, SEPARATION, HeldOut, Scene, Thing, sample_pairs

FRAMES = 9

MOTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
"""Direction (x, y) of each motion."""

CLIP_SHAPES = ("circle", "square", "triangle", "cross")
"""The shapes that clips hold: half of the world's, which is what a video model learns in the time there is."""

RADII, TRAVEL = (0.13, 0.20), (0.25, 0.45)
STILL, TWO = 0.15, 0.5
"""How often a thing stands still, and how often a clip holds two things rather than one."""

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "still": "still"}


@dataclass(frozen=True)
class Mover:
    """A thing where it is in the first frame, its motion, and the way it makes from the first frame to the last.

    Raises:
        ValueError: the motion is none of `MOTIONS`.
    """

    thing: Thing
    motion: str
    travel: float

    def __post_init__(self) -> None:
        if self.motion not in MOTIONS:
            raise ValueError(f"unknown motion {self.motion!r}; known: {', '.join(MOTIONS)}")

    def at(self, time: float) -> Thing:
        """The thing at a time from 0, the first frame, to 1, the last."""
        x, y = MOTIONS[self.motion]
        way = self.travel * time
        return replace(self.thing, cx=self.thing.cx + x * way, cy=self.thing.cy + y * way)


@dataclass(frozen=True)
class Clip:
    """Things in motion on a background, for `FRAMES` frames."""

    movers: tuple[Mover, ...]
    background: str

    def scene(self, frame: int) -> Scene:
        """What a frame shows, 0 to FRAMES - 1."""
        return Scene(tuple(mover.at(frame / (FRAMES - 1)) for mover in self.movers), self.background)

    @property
    def scenes(self) -> list[Scene]:
        """What each frame shows, in order."""
        return [self.scene(frame) for frame in range(FRAMES)]

    @property
    def asked(self) -> list[tuple[str, str, str]]:
        """(shape, colour, motion) of each thing, as the score functions take them."""
        return [(mover.thing.shape, mover.thing.colour, mover.motion) for mover in self.movers]

    def backwards(self) -> Clip:
        """The clip whose frames are this one's from the last to the first."""
        movers = tuple(Mover(m.at(1), OPPOSITE[m.motion], m.travel) for m in self.movers)
        return replace(self, movers=movers)


def sample_clip(rng: np.random.Generator, count: int | None = None, held_out: HeldOut = "never") -> Clip:
    """Draw a clip of things with different colours and shapes, which stay in the picture and clear of one another.

    Args:
        rng: source of randomness; see `scene_rng` for streams by (seed, index).
        count: how many things, 1 or 2; None draws it as in training.
        held_out: see `sample_pairs`.

    Raises:
        ValueError: count is outside 1..2.
    """
    if count not in (None, 1, 2):
        raise ValueError(f"count must be 1 or 2, got {count}")
    count = count or 1 + int(rng.random() < TWO)
    while True:
        pairs = sample_pairs(rng, count, held_out)
        if all(shape in CLIP_SHAPES for _, shape in pairs):
            break
    while not _apart(movers := tuple(_sample_mover(rng, shape, colour) for colour, shape in pairs)):
        pass
    return Clip(movers, BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))])


def _sample_mover(rng: np.random.Generator, shape: str, colour: str) -> Mover:
    motion = "still" if rng.random() < STILL else tuple(MOTIONS)[int(rng.integers(4))]
    r, travel = float(rng.uniform(*RADII)), float(rng.uniform(*TRAVEL))
    low, high = MARGIN * r, 1 - MARGIN * r
    # Where the first frame may have it, so that the last one still does.
    x, y = (float(rng.uniform(low + travel * max(0, -way), high - travel * max(0, way))) for way in MOTIONS[motion])
    return Mover(Thing(shape, colour, x, y, r), motion, travel)


def _apart(movers: tuple[Mover, ...]) -> bool:
    for time in np.linspace(0, 1, FRAMES):
        for a, b in combinations([mover.at(float(time)) for mover in movers], 2):
            if (a.cx - b.cx) ** 2 + (a.cy - b.cy) ** 2 < (SEPARATION * (a.r + b.r)) ** 2:
                return False
    return True
