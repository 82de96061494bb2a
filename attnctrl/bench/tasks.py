"""What is asked for: prompts of the shapes world, boxes and seeds, the same for every method of a bench."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from attnctrl.regions import Region
from attnctrl.shapes.captions import article
from attnctrl.shapes.layouts import Box, Layout, Split, sample_layout
from attnctrl.shapes.render import render
from attnctrl.shapes.world import HALF_EXTENT, HELD_OUT, HeldOut, Scene, Thing

HELD_OUT_EVERY = 5
"""One prompt in five asks for a colour-shape pair that no training picture held; the others hold trained pairs."""


@dataclass(frozen=True)
class Task:
    """One picture to draw: what, where, and from which noise."""

    layout: Layout
    seed: int

    @property
    def prompt(self) -> str:
        return self.layout.prompt

    @cached_property
    def regions(self) -> list[Region]:
        """Each object's phrase with its box."""
        return [Region(p, box=b) for p, b in zip(self.layout.phrases, self.layout.boxes, strict=True)]

    @cached_property
    def ideal(self) -> np.ndarray:
        """What was asked, drawn exactly: the largest undistorted shapes in their boxes, (128, 128, 3) in 0..1."""
        things = tuple(fitted(*thing) for thing in self.layout.things)
        return render([Scene(things, self.layout.background)])[0].permute(1, 2, 0).numpy()

    @property
    def held_out(self) -> bool:
        """Whether a colour-shape pair is asked for that no training picture held."""
        return any((colour, shape) in HELD_OUT for shape, colour in self.layout.asked)

    @property
    def background(self) -> str:
        """What is where no object is, in words."""
        return f"{article(self.layout.background)} {self.layout.background} background"

    @property
    def nouns(self) -> list[str]:
        """The objects without their colours: what the fidelity methods are to make appear."""
        return [shape for shape, _ in self.layout.asked]


def given(tasks: Sequence[Task]) -> dict[str, Any]:
    """What these tasks tell a method, a list with one entry per prompt, under the names of the controls' fields."""
    return {
        "regions": [t.regions for t in tasks],
        "phrases": [t.nouns for t in tasks],
        "background": [t.background for t in tasks],
    }


def fitted(shape: str, colour: str, box: Box) -> Thing:
    """The largest undistorted shape in its box."""
    x0, y0, x1, y1 = box
    half_w, half_h = HALF_EXTENT[shape]
    r = min((x1 - x0) / half_w, (y1 - y0) / half_h) / 2
    return Thing(shape, colour, (x0 + x1) / 2, (y0 + y1) / 2, r)


def make_tasks(objects: int, images: int, split: Split = "test", seed: int = 0) -> list[Task]:
    """The first `images` tasks with `objects` objects each, 1 to 4.

    Task i depends on (seed, objects, i, split) alone: more images extend a list, batches and methods never change
    it. The tasks of two splits share no prompt.
    """
    tasks = []
    for index in range(images):
        rng = np.random.default_rng((seed, objects, index))
        held_out: HeldOut = "one" if index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "never"
        layout = sample_layout(rng, objects, held_out=held_out, split=split)
        tasks.append(Task(layout, int(rng.integers(2**31))))
    return tasks
