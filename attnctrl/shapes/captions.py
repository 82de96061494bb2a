"""Plain-English captions of scenes: varied ones for training, one canonical form for prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .world import BACKGROUNDS, COLOURS, LARGE, SHAPES, SMALL, Scene

PREFIXES = ("photo of", "a picture of", "an image of")
JOINS = ("and", ",", "with", "next to")
SIZES = ("small", "large")
_GLUE = ("a", "an", "of", "photo", "picture", "image", "and", ",", "with", "next", "to", "on", "background")

WORDS = tuple(sorted({*_GLUE, *SIZES, *SHAPES, *COLOURS, *BACKGROUNDS}))
"""Every word a caption can hold, alphabetical."""

P_PREFIX, P_NO_ARTICLE, P_SIZE, P_BACKGROUND, P_EMPTY, P_NO_COLOUR = 0.4, 0.12, 0.5, 0.8, 0.10, 0.10


def article(word: str) -> str:
    """'a' or 'an', as the word wants it."""
    return "an" if word[0] in "aeiou" else "a"


def phrase(shape: str, colour: str | None = None) -> str:
    """'a red circle', or 'a circle' without a colour."""
    words = f"{colour} {shape}" if colour else shape
    return f"{article(words)} {words}"


def prompt_for(things: Sequence[tuple[str, str]], background: str | None = None) -> tuple[str, list[str]]:
    """The canonical prompt for things named in order.

    Args:
        things: (shape, colour) each; at least one.
        background: one of the world's backgrounds, or None to leave it open.

    Returns:
        ("a red circle, a blue square and a green star on a white background",
        ["a red circle", "a blue square", "a green star"]).

    Raises:
        ValueError: there is nothing to name.
    """
    if not things:
        raise ValueError("a prompt needs at least one thing")
    phrases = [phrase(shape, colour) for shape, colour in things]
    text = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    if background is not None:
        text += f" on {article(background)} {background} background"
    return text, phrases


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A random caption of a scene; 10% are empty, for classifier-free guidance. Never says where things are."""
    draw = rng.random(4 + 4 * len(scene.things))
    if draw[0] < P_EMPTY:
        return ""
    text = PREFIXES[int(draw[1] / P_PREFIX * len(PREFIXES))] + " " if draw[1] < P_PREFIX else ""
    for i, which in enumerate(rng.permutation(len(scene.things))):
        thing, (no_article, size, no_colour, join) = scene.things[which], draw[4 + 4 * i : 8 + 4 * i]
        words = thing.shape if no_colour < P_NO_COLOUR else f"{thing.colour} {thing.shape}"
        if size < P_SIZE and (thing.r < SMALL or thing.r > LARGE):
            words = f"{'small' if thing.r < SMALL else 'large'} {words}"
        if i:
            joint = JOINS[int(join * len(JOINS))]
            text += ", " if joint == "," else f" {joint} "
        text += words if no_article < P_NO_ARTICLE else f"{article(words)} {words}"
    if draw[2] < P_BACKGROUND:
        text += f" on {article(scene.background)} {scene.background} background"
    return text
