"""Requests that fill the page."""

from __future__ import annotations

import numpy as np
from PIL import Image

from attnctrl.models import SHIPPED
from attnctrl.pipelines.readout import LATE
from attnctrl.ui.request import Place, Request, Sitter

_LEFT, _RIGHT = (0.06, 0.25, 0.46, 0.75), (0.54, 0.25, 0.94, 0.75)


def _pair(
    prompt: str, first: str, second: str, *methods: str, seed: int = 1, boxes: tuple = (_LEFT, _RIGHT)
) -> Request:
    places = (Place(first, boxes[0]), Place(second, boxes[1]))
    return Request(prompt=prompt, regions=places, methods={m: {} for m in methods}, seed=seed, guidance=3.5)


_SHAPES = {
    "A red circle left, a blue square right": _pair(
        "a red circle and a blue square", "a red circle", "a blue square", "loco",
        boxes=((0.05, 0.1, 0.45, 0.6), (0.55, 0.4, 0.95, 0.9)),
    ),
    "Two methods at once": _pair(
        "a green star and a yellow heart on a black background", "a green star", "a yellow heart",
        "region-mask", "layout-guidance", seed=3,
    ),
    "Nothing drawn: colours that stay with their nouns": Request(
        prompt="a purple ring and an orange cross", methods={"bundled-attention": {}}, seed=2, guidance=3.5
    ),
}  # fmt: skip

_ANIMALS = {
    "A cat left, a dog right": Request(
        prompt="a photo of a cat and a dog",
        regions=(Place("a cat", _LEFT), Place("a dog", _RIGHT)),
        methods={"region-mask": {}},
    ),
}


CLIPS = {
    "A circle left, a square moves right": Request(
        task="video",
        prompt="a red circle standing still and a blue square moving right on a white background",
        regions=(Place("a red circle", (0.06, 0.08, 0.44, 0.46)), Place("a blue square", (0.3, 0.54, 0.9, 0.92))),
        methods={"region-mask": {}, "radial": {}},
        seed=5,
        steps=24,
        guidance=3.5,
    ),
    "A fifth of the attention": Request(
        task="video",
        prompt="a green star moving left and a purple ring standing still on a white background",
        methods={"radial": {}},
        seed=3,
        steps=24,
        guidance=3.5,
    ),
}
"""Examples for the Video tab."""


def examples(model: str) -> dict[str, Request]:
    """Layout examples for a model, the first of which is what the page begins with."""
    return _SHAPES if model.startswith(SHIPPED) else _ANIMALS


def has_examples(model: str) -> bool:
    """Whether the pictures below mean something to the model: they are of the shapes world."""
    return model.startswith(SHIPPED)


def edit_example() -> tuple[Image.Image, Request]:
    """A picture and its edit."""
    asked = Request(
        task="edit",
        prompt="a red circle and a blue square on a white background",
        edits=(("blue square", "yellow heart"),),
        regions=(Place("blue square", (0.42, 0.38, 0.96, 0.94)),),
    )
    return _picture(("circle", "red", 0.3, 0.35, 0.17), ("square", "blue", 0.68, 0.66, 0.18)), asked


def subjects_example() -> tuple[list[Image.Image], Request]:
    """One picture of each of two subjects, transparent around them, and where they belong."""
    asked = Request(
        task="subjects",
        prompt="a circle and a square on a white background",
        regions=(Place("a circle", (0.07, 0.32, 0.43, 0.68)), Place("a square", (0.57, 0.32, 0.93, 0.68))),
        methods={"region-mask": {}, "delayed-subject": {"delay": 0.0}},
        subjects=(Sitter("a circle"), Sitter("a square")),
        seed=2,
        steps=25,
        guidance=3.5,
    )
    return [_cut_out("circle", "purple"), _cut_out("square", "green")], asked


def read_example() -> tuple[list[Image.Image], Request]:
    """Two pictures of the same things in other places; the regions are of the first."""
    asked = Request(
        task="read",
        prompt="a red circle and a blue square on a white background",
        regions=(Place("circle", (0.14, 0.19, 0.46, 0.51)),),
        methods={"segment": {"window_start": LATE.start}},
        phrases=("red circle", "blue square"),
        steps=10,
    )
    first = _picture(("circle", "red", 0.3, 0.35, 0.17), ("square", "blue", 0.68, 0.66, 0.18))
    return [first, _picture(("circle", "red", 0.66, 0.62, 0.17), ("square", "blue", 0.28, 0.3, 0.18))], asked


def _picture(*things: tuple[str, str, float, float, float]) -> Image.Image:
    from attnctrl.shapes import Scene, Thing, render

    pixels = render([Scene(tuple(Thing(*one) for one in things), "white")])[0].permute(1, 2, 0).numpy()
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _cut_out(shape: str, colour: str) -> Image.Image:
    """A thing in the middle of its picture, all else transparent."""
    from attnctrl.shapes import Thing, thing_mask

    thing = (shape, colour, 0.5, 0.5, 0.22)
    picture = _picture(thing)
    picture.putalpha(Image.fromarray(np.uint8(255) * (np.asarray(thing_mask(Thing(*thing))) > 0.5)))
    return picture
