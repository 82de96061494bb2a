"""The shapes world: which things exist, where they may stand, and how scenes are drawn at random.

Lengths and positions are fractions of the image side; x runs to the right and y downwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "cyan")
BACKGROUNDS = ("white", "gray", "black", "beige")

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.15, 0.15),
    "green": (0.14, 0.62, 0.22),
    "blue": (0.15, 0.32, 0.88),
    "yellow": (0.95, 0.84, 0.10),
    "purple": (0.55, 0.18, 0.72),
    "orange": (0.96, 0.50, 0.06),
    "pink": (0.97, 0.52, 0.76),
    "cyan": (0.12, 0.78, 0.84),
}
GROUND: dict[str, tuple[float, float, float]] = {
    "white": (0.96, 0.96, 0.96),
    "gray": (0.54, 0.54, 0.54),
    "black": (0.06, 0.06, 0.06),
    "beige": (0.90, 0.83, 0.68),
}
"""RGB in 0..1 of things (PALETTE) and of backgrounds (GROUND)."""

# Colour-shape pairs that never occur in training: each colour and each shape is left out of exactly one pair.
HELD_OUT = frozenset((colour, SHAPES[(3 * i + 1) % 8]) for i, colour in enumerate(COLOURS))

# Half width and half height of each shape's true extent, in units of the thing's r; centred on (cx, cy).
HALF_EXTENT: dict[str, tuple[float, float]] = {
    "circle": (1.0, 1.0),
    "square": (0.84, 0.84),
    "triangle": (0.92, 0.92 * 3**0.5 / 2),
    "star": (1.08 * 0.9510565163, 1.08 * 0.9045084972),
    "cross": (0.96, 0.96),
    "ring": (1.0, 1.0),
    "heart": (1.62 * (0.25 + 2**0.5 / 4), 1.62 * (0.75 + 2**0.5 / 4) / 2),
    "diamond": (0.78, 1.04),
}

SMALL, LARGE = 0.112, 0.175
"""Radii under SMALL may be called "small" in a caption, radii over LARGE "large"."""

TRAIN_COUNTS: dict[int, float] = {1: 0.25, 2: 0.40, 3: 0.35}
"""How many things a training scene holds, with probabilities. Four never occur in training."""

# Wide enough that the corners of two shapes never touch (the farthest corner lies 1.19 r from its centre).
SEPARATION = 1.2
MARGIN = 1.1

HeldOut = Literal["never", "one", "any"]


@dataclass(frozen=True)
class Thing:
    """One shape: centre (cx, cy) and radius r as fractions of the image side.

    Raises:
        ValueError: shape or colour is not of this world, or r is not positive.
    """

    shape: str
    colour: str
    cx: float
    cy: float
    r: float

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"unknown shape {self.shape!r}; known: {', '.join(SHAPES)}")
        if self.colour not in COLOURS:
            raise ValueError(f"unknown colour {self.colour!r}; known: {', '.join(COLOURS)}")
        if not self.r > 0:
            raise ValueError(f"r must be positive, got {self.r}")

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape)."""
        return self.colour, self.shape

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Exact bounding box (x0, y0, x1, y1) of what is drawn, as fractions; may leave [0, 1]."""
        half_w, half_h = HALF_EXTENT[self.shape]
        return (
            self.cx - half_w * self.r,
            self.cy - half_h * self.r,
            self.cx + half_w * self.r,
            self.cy + half_h * self.r,
        )


@dataclass(frozen=True)
class Scene:
    """Things, drawn in order (later ones on top), on a background.

    Raises:
        ValueError: background is not of this world.
    """

    things: tuple[Thing, ...]
    background: str

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"unknown background {self.background!r}; known: {', '.join(BACKGROUNDS)}")


def scene_rng(seed: int, index: int) -> np.random.Generator:
    """The generator of scene `index` of stream `seed`: the same on every machine, in any order of asking."""
    return np.random.default_rng((seed, index))


def sample_pairs(
    rng: np.random.Generator, count: int, held_out: HeldOut = "never", distinct: bool = True
) -> list[tuple[str, str]]:
    """Draw `count` different (colour, shape) pairs.

    Args:
        rng: source of randomness.
        count: 1 to 8.
        held_out: "never" uses trained pairs only, "one" exactly one pair of `HELD_OUT`, "any" ignores the split.
        distinct: also keep all colours different and all shapes different.

    Raises:
        ValueError: count is outside 1..8 or held_out is unknown.
    """
    if not 1 <= count <= 8:
        raise ValueError(f"count must be 1..8, got {count}")
    if held_out not in ("never", "one", "any"):
        raise ValueError(f"held_out must be 'never', 'one' or 'any', got {held_out!r}")
    wanted = {"never": 0, "one": 1, "any": None}[held_out]
    while True:
        if distinct:
            colours, shapes = rng.permutation(8)[:count], rng.permutation(8)[:count]
        else:
            colours, shapes = rng.integers(0, 8, count), rng.integers(0, 8, count)
        pairs = [(COLOURS[c], SHAPES[s]) for c, s in zip(colours, shapes, strict=True)]
        if wanted is not None and sum(p in HELD_OUT for p in pairs) != wanted:
            continue
        if len(set(pairs)) == count:
            return pairs


def sample_radius(rng: np.random.Generator) -> float:
    """A radius in .085..0.21: mostly uniform in .10..20, sometimes extreme enough for a size word."""
    kind = rng.random()
    if kind < 0.12:
        return float(rng.uniform(0.085, 0.115))
    if kind < 0.24:
        return float(rng.uniform(0.17, 0.21))
    return float(rng.uniform(0.10, 0.20))


def place(rng: np.random.Generator, radii: list[float]) -> list[tuple[float, float, float]] | None:
    """Centres for discs of these radii, inside the image and clear of one another, or None if it found no room.

    Returns:
        (cx, cy, r) per radius, in the order given; radii are kept.
    """
    placed: list[tuple[float, float, float]] = []
    for r in radii:
        low, high = MARGIN * r, 1 - MARGIN * r
        for _ in range(60):
            x, y = (float(v) for v in rng.uniform(low, high, 2))
            if all((x - a) ** 2 + (y - b) ** 2 >= (SEPARATION * (r + s)) ** 2 for a, b, s in placed):
                placed.append((x, y, r))
                break
        else:
            return None
    return placed


def sample_scene(
    rng: np.random.Generator,
    counts: dict[int, float] | int | None = None,
    held_out: HeldOut = "never",
    distinct: bool | None = None,
) -> Scene:
    """Draw a scene.

    Args:
        rng: source of randomness; see `scene_rng` for streams by (seed, index).
        counts: how many things: a number, or a table of probabilities; default `TRAIN_COUNTS`.
        held_out: see `sample_pairs`.
        distinct: all colours differ and all shapes differ; None draws True with probability 0.7, as in training.
    """
    table = TRAIN_COUNTS if counts is None else {counts: 1.0} if isinstance(counts, int) else counts
    weights = np.array(list(table.values()))
    count = int(rng.choice(list(table), p=weights / weights.sum()))
    if distinct is None:
        distinct = bool(rng.random() < 0.7)
    pairs = sample_pairs(rng, count, held_out, distinct)
    while (spots := place(rng, [sample_radius(rng) for _ in pairs])) is None:
        pass
    things = tuple(Thing(s, c, x, y, r) for (c, s), (x, y, r) in zip(pairs, spots, strict=True))
    return Scene(things, BACKGROUNDS[int(rng.integers(4))])
