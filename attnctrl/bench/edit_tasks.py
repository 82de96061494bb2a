"""Edits of rendered scenes, whose right answers are known exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from attnctrl.bench.tasks import fitted
from attnctrl.edits import Edit
from attnctrl.shapes.captions import prompt_for
from attnctrl.shapes.layouts import Layout, Split, sample_layout
from attnctrl.shapes.render import render
from attnctrl.shapes.world import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES, Scene

KINDS = ("recolour", "reshape", "replace", "remove", "background", "two")
SIDE = 128


@dataclass(frozen=True, eq=False)
class EditTask:
    """A scene, and what is to become of it.

    kind: of KINDS. layout: the scene as it is. wanted: each object's (shape, colour) afterwards, None for the one that
    goes; background: likewise. edits: the changes of the prompt, each with its mask. seed: of the noise.
    """

    kind: str
    layout: Layout
    wanted: tuple[tuple[str, str] | None, ...]
    background: str
    edits: tuple[Edit, ...]
    order: tuple[int, ...]
    seed: int

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
    def changed(self) -> list[int]:
        """The objects that do not stay as they are."""
        return [i for i, (now, then) in enumerate(zip(self.layout.asked, self.wanted, strict=True)) if now != then]

    @property
    def mask(self) -> np.ndarray:
        """Where anything may change, (128, 128) bytes, 255 inside."""
        return np.maximum.reduce([edit.mask for edit in self.edits])


def make_edits(kind: str, images: int, split: Split = "test", seed: int = 0) -> list[EditTask]:
    """The first `images` tasks of a kind; task i depends on (kind, seed, i, split) alone.

    Scenes hold two objects, three in every other task. What is asked for occurred in training and stands nowhere in
    the scene. The tasks of two splits share no source prompt.
    """
    return [_make(kind, index, split, seed) for index in range(images)]


def _make(kind: str, index: int, split: Split, seed: int) -> EditTask:
    rng = np.random.default_rng((seed, KINDS.index(kind), index))
    layout = sample_layout(rng, 2 + index % 2, split=split)
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
    return EditTask(kind, layout, tuple(wanted), background, tuple(edits), order, int(rng.integers(2**31)))


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


def ground_mask(layout: Layout) -> np.ndarray:
    """The pixels where no object stands, (128, 128) bytes, 255 there."""
    things = tuple(fitted(*thing) for thing in layout.things)
    whole, bare = render([Scene(things, layout.background), Scene((), layout.background)])
    return np.where((whole - bare).abs().amax(dim=0).numpy() > 0.02, 0, 255).astype(np.uint8)
