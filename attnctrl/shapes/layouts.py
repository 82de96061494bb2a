"""Random tasks for benchmarks: a prompt, and a box for each of its objects. Tuning and test tasks never overlap."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .captions import prompt_for
from .world import BACKGROUNDS, HeldOut, sample_pairs

Box = tuple[float, float, float, float]
Split = Literal["tune", "test"]

SIDES = (0.25, 0.42)
MARGIN, GAP = 0.04, 0.04


@dataclass(frozen=True)
class Layout:
    """Objects asked for, each with a box (x0, y0, x1, y1) in fractions of the image side, and the background."""

    things: tuple[tuple[str, str, Box], ...]
    background: str

    @property
    def asked(self) -> list[tuple[str, str]]:
        """(shape, colour) of each object, as the score functions take them."""
        return [(shape, colour) for shape, colour, _ in self.things]

    @property
    def boxes(self) -> list[Box]:
        """The box of each object."""
        return [box for _, _, box in self.things]

    @property
    def prompt(self) -> str:
        """The canonical prompt; it says nothing of the boxes."""
        return prompt_for(self.asked, self.background)[0]

    @property
    def phrases(self) -> list[str]:
        """Each object's phrase as it stands in the prompt."""
        return prompt_for(self.asked, self.background)[1]


def split_of(prompt: str) -> Split:
    """Which split a canonical prompt belongs to: the parity of its BLAKE2 hash, so no prompt is in both."""
    parity = hashlib.blake2b(prompt.encode(), digest_size=1).digest()[0] & 1
    return "test" if parity else "tune"


def sample_boxes(rng: np.random.Generator, count: int) -> list[Box]:
    """Boxes with sides of 0.25 to 0.42, at least 0.04 apart and 0.04 from the image's edge; count is 1 to 4.

    Raises:
        ValueError: count is outside 1..4.
    """
    if not 1 <= count <= 4:
        raise ValueError(f"count must be 1..4, got {count}")
    while True:
        boxes: list[Box] = []
        for _ in range(40 * count):
            width, height = (float(v) for v in rng.uniform(*SIDES, 2))
            x0, y0 = (
                float(rng.uniform(MARGIN, 1 - MARGIN - width)),
                float(rng.uniform(MARGIN, 1 - MARGIN - height)),
            )
            box = (x0, y0, x0 + width, y0 + height)
            if all(apart(box, other) for other in boxes):
                boxes.append(box)
            if len(boxes) == count:
                return boxes


def apart(a: Box, b: Box) -> bool:
    """Whether two boxes have at least GAP between them."""
    return a[0] - b[2] >= GAP or b[0] - a[2] >= GAP or a[1] - b[3] >= GAP or b[1] - a[3] >= GAP


def sample_layout(
    rng: np.random.Generator, n_objects: int, held_out: HeldOut = "never", split: Split = "test"
) -> Layout:
    """A random layout of objects with different colours and different shapes.

    Args:
        rng: source of randomness; see `scene_rng` for streams by (seed, index).
        n_objects: 1 to 4 (training scenes hold at most 3).
        held_out: whether colour-shape pairs never seen in training occur; see `sample_pairs`.
        split: "tune" for choosing settings, "test" for reporting; their prompts are disjoint.

    Raises:
        ValueError: n_objects is outside 1..4, or split is unknown.
    """
    if split not in ("tune", "test"):
        raise ValueError(f"split must be 'tune' or 'test', got {split!r}")
    while True:
        pairs = sample_pairs(rng, n_objects, held_out, distinct=True)
        background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
        prompt, _ = prompt_for([(shape, colour) for colour, shape in pairs], background)
        if split_of(prompt) == split:
            break
    boxes = sample_boxes(rng, n_objects)
    things = tuple((shape, colour, box) for (colour, shape), box in zip(pairs, boxes, strict=True))
    return Layout(things, background)
