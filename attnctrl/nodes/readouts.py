"""Pipeline nodes that read given pictures and draw nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from attnctrl.errors import ControlError
from attnctrl.nodes.forms import Node, Port, number, text
from attnctrl.nodes.pictures import as_pictures, mask_picture
from attnctrl.nodes.pipeline import (
    CATEGORY,
    Chosen,
    chosen,
    lines,
    methods_port,
    pipeline_port,
    sampled,
    with_gradients,
)
from attnctrl.pipelines import ReadoutPipeline


def _params(methods: Chosen, name: str) -> dict[str, Any]:
    """The arguments that a readout's method was given. Raises ControlError for other methods."""
    named = chosen(methods, ("readout",), "a readout")
    others = [one for one in named if one != name]
    if others:
        raise ControlError(f"{others[0]} does something else: this node takes parameters of {name}.")
    return dict(named.get(name, {}))


@with_gradients
def segment(
    pipeline: Any, image: torch.Tensor, prompt: str, phrases: str, steps: int, seed: int, methods: Chosen = ()
) -> tuple[torch.Tensor]:
    """The masks of phrases in a given picture, in their order; of the prompt's nouns where none is named."""
    found = ReadoutPipeline(pipeline).segment(
        as_pictures(image)[0], prompt, lines(phrases) or None, steps=steps, seed=seed, **_params(methods, "segment")
    )
    return (found.masks[0].float(),)


@with_gradients
def segment_like(
    pipeline: Any, image: torch.Tensor, mask: torch.Tensor, other: torch.Tensor, steps: int, seed: int,
    methods: Chosen = (),
) -> tuple[torch.Tensor]:  # fmt: skip
    """The mask of what is like a marked part of one picture in another: of one part per mask of the batch."""
    readout, params = ReadoutPipeline(pipeline), _params(methods, "segment-like-me")
    picture = as_pictures(image)[0]
    labels = np.zeros((picture.height, picture.width), dtype=np.int64)
    for number_, one in enumerate(mask, 1):
        labels[np.asarray(mask_picture(one).resize(picture.size)) > 127] = number_
    parts = readout.learn(picture, labels, steps=steps, seed=seed, **params)
    found = readout.segment_like(as_pictures(other)[0], parts, steps=steps, seed=seed, **params)[0]
    return (torch.stack([(found == i).float() for i in range(1, len(mask) + 1)]),)


@with_gradients
def correspond(
    pipeline: Any, image: torch.Tensor, x: float, y: float, other: torch.Tensor, steps: int, seed: int,
    methods: Chosen = (),
) -> tuple[float, float]:  # fmt: skip
    """The point of another picture that is what (x, y) is in this one, in fractions."""
    params = _params(methods, "correspond")
    return ReadoutPipeline(pipeline).correspond(
        as_pictures(image)[0], (x, y), as_pictures(other)[0], steps=steps, seed=seed, **params
    )


def _image(name: str = "image", about: str = "") -> Port:
    return Port(name, "IMAGE", about)


STEPS_SEED = (sampled()[0], sampled()[2])
NODES = (
    Node(
        "AttnCtrlSegment", "Segment (attnctrl)", CATEGORY, "Masks of words in a given picture.",
        (
            pipeline_port(), _image(), text("prompt", about="what the picture shows", lines=True),
            text("phrases", about="one phrase a line; empty: the nouns", lines=True), *STEPS_SEED, methods_port(),
        ),
        (Port("mask", "MASK"),), segment,
    ),
    Node(
        "AttnCtrlSegmentLike", "Segment like this (attnctrl)", CATEGORY, "Finds parts like those of one example.",
        (
            pipeline_port(), _image(about="the example"), Port("mask", "MASK", "its parts, one mask each"),
            _image("other"), *STEPS_SEED, methods_port(),
        ),
        (Port("mask", "MASK"),), segment_like,
    ),
    Node(
        "AttnCtrlCorrespond", "Correspond (attnctrl)", CATEGORY, "The counterpart of a point in another picture.",
        (
            pipeline_port(), _image(), number("x", 0.5, 0, 1, "fraction of the width"),
            number("y", 0.5, 0, 1, "fraction of the height"), _image("other"), *STEPS_SEED, methods_port(),
        ),
        (Port("x", "FLOAT"), Port("y", "FLOAT")), correspond,
    ),
)  # fmt: skip
