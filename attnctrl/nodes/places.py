"""Regions as nodes hand them on: a phrase, a mask or a box, and what the region shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch

from attnctrl.errors import ControlError
from attnctrl.nodes.words import Words
from attnctrl.regions import Box, Region

LONGEST = 8
"""Texts of regions are repeated to one length, at most so many times as long as the longest of them."""


@dataclass(frozen=True, eq=False)
class Place:
    """One region, for both layers of nodes.

    mask: (height, width) in [0, 1], or None where a box says it. conditioning: what ComfyUI's encoder made of the
    region's own prompt, for native nodes.
    """

    phrase: str
    mask: torch.Tensor | None
    box: Box | None
    prompt: str = ""
    weight: float = 1.0
    conditioning: Any = None

    def region(self) -> Region:
        """For attnctrl's pipelines. Raises ControlError without a phrase, and as `Region` does."""
        return self._named(self.phrase, self.prompt or None)

    def _named(self, phrase: str, prompt: str | None) -> Region:
        return Region(phrase, box=self.box, mask=self.mask, prompt=prompt, weight=self.weight)


@dataclass(frozen=True, eq=False)
class Placed:
    """Regions for a control in ComfyUI's own models.

    texts: by `Region.text` and by phrase, embeddings (1, tokens, channels).
    """

    regions: tuple[Region, ...]
    texts: Mapping[str, torch.Tensor]


def region(
    phrase: str,
    weight: float = 1.0,
    prompt: str = "",
    x0: float = 0.0,
    y0: float = 0.0,
    x1: float = 1.0,
    y1: float = 1.0,
    mask: torch.Tensor | None = None,
    conditioning: Any = None,
    regions: tuple[Place, ...] = (),
) -> tuple[tuple[Place, ...]]:
    """The node Region: `regions` and one more. mask: ComfyUI's (batch, height, width), of which the first counts.

    Raises ControlError for empty masks and boxes.
    """
    box = None if mask is not None else (x0, y0, x1, y1)
    one = Place(phrase.strip(), None if mask is None else as_mask(mask), box, prompt.strip(), weight, conditioning)
    one._named(one.phrase or "a region", None)  # its shape is checked where it is drawn
    return ((*(regions or ()), one),)


def as_mask(mask: torch.Tensor) -> torch.Tensor:
    """ComfyUI's mask, (batch, height, width) or (height, width), as (height, width)."""
    return (mask if mask.ndim == 2 else mask[0]).detach().float().cpu()


def by_words(places: Sequence[Place], words: Words | None) -> Placed:
    """Regions whose phrases are words of a prompt: for `RegionMask` and `DenseDiffusion`.

    Raises ControlError where there is no prompt, or a phrase is not in it; the sentence shows its tokens.
    """
    if words is None:
        raise ControlError(
            "the words of the regions are sought in a prompt: connect words of the node Prompt with words."
        )
    found, texts = [], {}
    for place in places:
        if not place.phrase:
            raise ControlError("a region has no phrase: give it the words of the prompt that belong there.")
        phrase = words.spelled(place.phrase)
        words.tokens.find(phrase)
        found.append(place._named(phrase, None))
        texts[phrase] = words.encode(place.phrase)
    return Placed(tuple(found), texts)


def by_text(places: Sequence[Place], words: Words | None) -> Placed:
    """Regions that have a text of their own: for `RegionPrompts`.

    Raises ControlError for a region without a conditioning where no encoder is at hand.
    """
    found, texts = [], {}
    for number, place in enumerate(places, 1):
        text = place.prompt or place.phrase
        if place.conditioning is None and (words is None or not text):
            raise ControlError(
                f"region {number} has no text: connect a conditioning to it, or give it a phrase and connect words."
            )
        # The name under which its text is kept: two regions may have one phrase and two conditionings.
        key = f"region {number}"
        phrase = words.spelled(place.phrase) if words is not None and place.phrase else key
        found.append(place._named(phrase, key))
        texts[key] = words.encode(text) if place.conditioning is None else place.conditioning[0][0]  # type: ignore[union-attr]
    return Placed(tuple(found), texts)


def stacked(texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Embeddings (1, tokens, channels) as one tensor, (texts, tokens, channels).

    Shorter ones are repeated, which changes no attention to them: every key weighs the same in more places.
    Raises ControlError where they would become too long, or are of different encoders.
    """
    if len({one.shape[-1] for one in texts}) > 1:
        raise ControlError("the regions' texts are of different encoders: encode them with the model's own CLIP.")
    length = lcm(*(one.shape[1] for one in texts))
    if length > LONGEST * max(one.shape[1] for one in texts):
        raise ControlError(
            f"the regions' texts have {', '.join(str(one.shape[1]) for one in texts)} tokens, which have no common "
            "length: make them about as long as each other."
        )
    return torch.cat([one[:1].repeat(1, length // one.shape[1], 1) for one in texts])
