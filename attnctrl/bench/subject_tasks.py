"""Subjects of the shapes world: captions that leave the colours open, and a picture that fixes each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from attnctrl.references import Subject
from attnctrl.shapes.captions import article, phrase
from attnctrl.shapes.layouts import Layout, Split, sample_layout
from attnctrl.shapes.render import render, thing_mask
from attnctrl.shapes.world import BACKGROUNDS, Scene, Thing

RADIUS = (0.16, 0.20)


@dataclass(frozen=True, eq=False)
class SubjectTask:
    """What is to be drawn, what it must look like, and from which noise.

    layout: the subjects with their colours and boxes, of which the prompt says the shapes alone. views: each subject
    alone on some ground, in the layout's order. seed: of the noise.
    """

    layout: Layout
    views: tuple[Scene, ...]
    seed: int

    @cached_property
    def phrases(self) -> list[str]:
        """Each subject without its colour."""
        return [phrase(shape) for shape, _ in self.layout.asked]

    @cached_property
    def prompt(self) -> str:
        """The canonical prompt without colours."""
        first, ground = ", ".join(self.phrases[:-1]), self.layout.background
        named = " and ".join(filter(None, [first, self.phrases[-1]]))
        return f"{named} on {article(ground)} {ground} background"

    def subjects(self, boxes: bool, reposition: bool = True) -> list[Subject]:
        """The subjects with exact masks; boxes: each with its region."""
        made = []
        for i, view in enumerate(self.views):
            pixels = render([view])[0].permute(1, 2, 0).numpy()
            made.append(
                Subject(
                    self.phrases[i],
                    pixels,
                    thing_mask(view.things[0]) > 0.5,
                    self.layout.boxes[i] if boxes else None,
                    prompt=f"{self.phrases[i]} on {article(view.background)} {view.background} background",
                    reposition=reposition,
                )
            )
        return made


def make_subject_tasks(objects: int, images: int, split: Split = "test", seed: int = 0) -> list[SubjectTask]:
    """The first `images` tasks with so many subjects, 1 to 3; task i depends on (seed, objects, i, split) alone.

    Colours and shapes of a task differ, and no pair was held out of training. Odd tasks are the even ones before them
    with the colours passed on by one subject: same prompt, boxes and noise, other references.
    """
    return [_make(objects, index, split, seed) for index in range(images)]


def _make(objects: int, index: int, split: Split, seed: int) -> SubjectTask:
    rng = np.random.default_rng((seed, objects, index // 2, 6))
    layout = sample_layout(rng, objects, split=split)
    things = []
    for shape, colour in layout.asked:
        r = float(rng.uniform(*RADIUS))
        cx, cy = (float(v) for v in rng.uniform(1.2 * r, 1 - 1.2 * r, 2))
        things.append((Thing(shape, colour, cx, cy, r), BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]))
    noise = int(rng.integers(2**31))
    if index % 2:
        colours = [colour for _, colour in layout.asked]
        passed = [*colours[-1:], *colours[:-1]]
        layout = Layout(
            tuple((s, c, box) for (s, _, box), c in zip(layout.things, passed, strict=True)), layout.background
        )
        things = [(Thing(t.shape, c, t.cx, t.cy, t.r), ground) for (t, ground), c in zip(things, passed, strict=True)]
    return SubjectTask(layout, tuple(Scene((thing,), ground) for thing, ground in things), noise)
