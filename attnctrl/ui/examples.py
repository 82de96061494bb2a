"""Requests that fill the page."""

from __future__ import annotations

import numpy as np
from PIL import Image

from attnctrl.models import SHIPPED
from attnctrl.ui.request import Place, Request

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


def examples(model: str) -> dict[str, Request]:
    """Layout examples for a model, the first of which is what the page begins with."""
    return _SHAPES if model.startswith(SHIPPED) else _ANIMALS


def edit_example(model: str) -> tuple[Image.Image, Request] | None:
    """A picture and its edit, for models of the shapes world."""
    if not model.startswith(SHIPPED):
        return None
    from attnctrl.shapes import Scene, Thing, render

    scene = Scene((Thing("circle", "red", 0.3, 0.35, 0.17), Thing("square", "blue", 0.68, 0.66, 0.18)), "white")
    pixels = render([scene])[0].permute(1, 2, 0).numpy()
    asked = Request(
        task="edit",
        prompt="a red circle and a blue square on a white background",
        edits=(("blue square", "yellow heart"),),
        regions=(Place("blue square", (0.42, 0.38, 0.96, 0.94)),),
    )
    return Image.fromarray((pixels * 255).round().astype(np.uint8)), asked
