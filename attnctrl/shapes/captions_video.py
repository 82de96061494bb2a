"""Plain-English captions of clips: varied ones for training, one canonical form for prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .captions import JOINS, P_BACKGROUND, P_EMPTY, P_NO_ARTICLE, P_NO_COLOUR, P_PREFIX, PREFIXES, article, phrase
from .captions import WORDS as STILL_WORDS
from .motion import MOTIONS, Clip

MOTION_WORDS = ("moving", "standing", *MOTIONS)
"""What captions of clips say that those of pictures never do."""

WORDS = (*STILL_WORDS, *MOTION_WORDS)
"""Every word a caption can hold."""

P_NO_MOTION = 0.1


def moving(motion: str) -> str:
    """'moving left' or 'standing still'.

    Raises:
        ValueError: the motion is none of `MOTIONS`.
    """
    if motion not in MOTIONS:
        raise ValueError(f"unknown motion {motion!r}; known: {', '.join(MOTIONS)}")
    return f"{'standing' if motion == 'still' else 'moving'} {motion}"


def clip_prompt(things: Sequence[tuple[str, str, str]], background: str | None = None) -> tuple[str, list[str]]:
    """The canonical prompt for moving things named in order.

    Args:
        things: (shape, colour, motion) each; at least one.
        background: one of the world's backgrounds, or None to leave it open.

    Returns:
        ("a red circle moving left and a blue square standing still on a white background",
        ["a red circle moving left", "a blue square standing still"]).

    Raises:
        ValueError: there is nothing to name, or a motion is unknown.
    """
    if not things:
        raise ValueError("a prompt needs at least one thing")
    phrases = [f"{phrase(shape, colour)} {moving(motion)}" for shape, colour, motion in things]
    text = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    if background is not None:
        text += f" on {article(background)} {background} background"
    return text, phrases


def clip_caption(clip: Clip, rng: np.random.Generator) -> str:
    """A random caption of a clip; 10% are empty, for classifier-free guidance. Never says where things are.

    Now and then it leaves out an article, a colour, a motion or the background.
    """
    draw = rng.random(3 + 4 * len(clip.movers))
    if draw[0] < P_EMPTY:
        return ""
    text = PREFIXES[int(draw[1] / P_PREFIX * len(PREFIXES))] + " " if draw[1] < P_PREFIX else ""
    for i, which in enumerate(rng.permutation(len(clip.movers))):
        shape, colour, motion = clip.asked[which]
        no_article, no_colour, no_motion, join = draw[3 + 4 * i : 7 + 4 * i]
        words = shape if no_colour < P_NO_COLOUR else f"{colour} {shape}"
        if i:
            joint = JOINS[int(join * len(JOINS))]
            text += ", " if joint == "," else f" {joint} "
        text += words if no_article < P_NO_ARTICLE else f"{article(words)} {words}"
        if no_motion >= P_NO_MOTION:
            text += f" {moving(motion)}"
    if draw[2] < P_BACKGROUND:
        text += f" on {article(clip.background)} {clip.background} background"
    return text
