"""Edits of rendered scenes, whose right answers are known exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from PIL import Image

from attnctrl.bench.tasks import fitted
from attnctrl.edits import Edit
from attnctrl.layers import Layer
from attnctrl.shapes.captions import prompt_for
from attnctrl.shapes.layouts import MARGIN as EDGE
from attnctrl.shapes.layouts import Box, Layout, Split, apart, sample_layout
from attnctrl.shapes.render import render
from attnctrl.shapes.world import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES, Scene

KINDS = ("recolour", "reshape", "replace", "remove", "background", "two", "move")
SIDE = 128
TRIES = 100
"""How many places are tried before another scene is drawn."""
HOLE = 0.04
"""The margin of holes: five pixels, for the 0.01 that is usual at 1024 pixels is less than one latent of these."""


@dataclass(frozen=True, eq=False)
class EditTask:
    """A scene, and what is to become of it.

    kind: of KINDS. layout: the scene as it is. wanted: each object's (shape, colour) afterwards, None for the one that
    goes; background: likewise. edits: the changes of the prompt, each with its mask. layers: objects that are moved or
    removed, as methods take them that do. moved: the new boxes of those that
    are moved. seed: of the noise.
    """

    kind: str
    layout: Layout
    wanted: tuple[tuple[str, str] | None, ...]
    background: str
    edits: tuple[Edit, ...]
    order: tuple[int, ...]
    seed: int
    layers: tuple[Layer, ...] = ()
    moved: dict[int, Box] = field(default_factory=dict)

    @cached_property
    def picture(self) -> Image.Image:
        """The scene, 128x128."""
        pixels = render([Scene(tuple(fitted(*thing) for thing in self.layout.things), self.layout.background)])[0]
        return Image.fromarray((pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))

    @property
    def target_prompt(self) -> str:
        """The prompt of what is wanted."""
        return prompt_for([w for w in self.wanted if w is not None], self.background)[0]

    @property
    def rest_prompt(self) -> str:
        """The prompt of the scene without the objects that are moved or removed: what their holes are filled with."""
        pairs = enumerate(self.wanted)
        return prompt_for([w for i, w in pairs if w is not None and i not in self.moved], self.background)[0]

    @property
    def changed(self) -> list[int]:
        """The objects that do not stay as they are."""
        pairs = enumerate(zip(self.layout.asked, self.wanted, strict=True))
        return [i for i, (now, then) in pairs if now != then or i in self.moved]

    @property
    def places(self) -> list[Box]:
        """Each object's box afterwards."""
        return [self.moved.get(i, box) for i, box in enumerate(self.layout.boxes)]

    @property
    def mask(self) -> np.ndarray:
        """Where anything may change, (128, 128) bytes, 255 inside."""
        moves = [box_mask([self.layout.boxes[i], box]) for i, box in self.moved.items()]
        return np.maximum.reduce([*moves, *(edit.mask for edit in self.edits)])


def make_edits(kind: str, images: int, split: Split = "test", seed: int = 0) -> list[EditTask]:
    """The first `images` tasks of a kind; task i depends on (kind, seed, i, split) alone.

    Scenes hold two objects, three in every other task. What is asked for occurred in training and, unless it is an
    object that moves, stands nowhere in the scene. The tasks of two splits share no source prompt.
    """
    return [_make(kind, index, split, seed) for index in range(images)]


def _make(kind: str, index: int, split: Split, seed: int) -> EditTask:
    rng = np.random.default_rng((seed, KINDS.index(kind), index))
    layout = sample_layout(rng, 2 + index % 2, split=split)
    if kind == "move":
        return _move(rng, layout, 2 + index % 2, split)
    wanted: list[tuple[str, str] | None] = list(layout.asked)
    background, edits = layout.background, []
    order = tuple(int(i) for i in rng.permutation(len(wanted))[: {"two": 2, "background": 0}.get(kind, 1)])
    for i in order:
        shape, colour = layout.asked[i]
        mask = box_mask([layout.boxes[i]])
        if kind == "remove":
            wanted[i] = None
            edits.append(Edit(layout.phrases[i], "", mask))
            continue
        shapes = [shape] if kind == "recolour" else _others(SHAPES, wanted, 0)
        colours = [colour] if kind == "reshape" else _others(COLOURS, wanted, 1)
        pairs = [(s, c) for s in shapes for c in colours if (c, s) not in HELD_OUT]
        new_shape, new_colour = wanted[i] = pairs[int(rng.integers(len(pairs)))]
        edits.append(Edit(f"{colour} {shape}", f"{new_colour} {new_shape}", mask))
    if kind == "background":
        others = [b for b in BACKGROUNDS if b != background]
        background = others[int(rng.integers(len(others)))]
        edits.append(Edit(f"{layout.background} background", f"{background} background", ground_mask(layout)))
    layers = tuple(Layer(edit.mask, remove=True, margin=HOLE) for edit in edits) if kind == "remove" else ()
    return EditTask(kind, layout, tuple(wanted), background, tuple(edits), order, int(rng.integers(2**31)), layers)


def _move(rng: np.random.Generator, layout: Layout, objects: int, split: Split) -> EditTask:
    """One object to another place, apart from all others and from its old one; scenes without room are drawn again."""
    while True:
        for _ in range(TRIES):
            i = int(rng.integers(objects))
            x0, y0, x1, y1 = layout.boxes[i]
            left, top = rng.uniform(EDGE, 1 - EDGE - (x1 - x0)), rng.uniform(EDGE, 1 - EDGE - (y1 - y0))
            box = (float(left), float(top), float(left + x1 - x0), float(top + y1 - y0))
            if all(apart(box, other) for other in layout.boxes):
                layer = Layer(object_mask(layout, i), dx=box[0] - x0, dy=box[1] - y0, margin=HOLE)
                seed = int(rng.integers(2**31))
                moved = {i: box}
                return EditTask("move", layout, tuple(layout.asked), layout.background, (), (), seed, (layer,), moved)
        layout = sample_layout(rng, objects, split=split)


def _others(names: Sequence[str], taken: Sequence[tuple[str, str] | None], part: int) -> list[str]:
    used = {pair[part] for pair in taken if pair is not None}
    return [name for name in names if name not in used]


def box_mask(boxes: Sequence[tuple[float, float, float, float]]) -> np.ndarray:
    """The pixels of boxes, (128, 128) bytes, 255 inside."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for box in boxes:
        x0, y0, x1, y1 = (round(v * SIDE) for v in box)
        mask[y0:y1, x0:x1] = 255
    return mask


def object_mask(layout: Layout, number: int) -> np.ndarray:
    """The pixels of one object, (128, 128) bytes, 255 there."""
    return 255 - ground_mask(replace(layout, things=layout.things[number : number + 1]))


def ground_mask(layout: Layout) -> np.ndarray:
    """The pixels where no object stands, (128, 128) bytes, 255 there."""
    things = tuple(fitted(*thing) for thing in layout.things)
    whole, bare = render([Scene(things, layout.background), Scene((), layout.background)])
    return np.where((whole - bare).abs().amax(dim=0).numpy() > 0.02, 0, 255).astype(np.uint8)
