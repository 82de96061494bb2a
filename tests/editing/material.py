"""What tests of edits share: two prompts in one run, calls without a model, and a given picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

import attnctrl as ac
from attnctrl.sites import Call, TokenLayout
from tests import tiny
from tests.methods import SITES, sampling, step

SOURCE, EDIT = "a cat and a dog", "a bird and a dog"
LONGER = "a red cat and a dog"


def latents(seed: int = 3) -> torch.Tensor:
    """The same start for the source and one edit, (2, 4, 16, 16)."""
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)).repeat(2, 1, 1, 1)


def draw(pipe: Any, prompts: list[str], *controls: ac.Control, **kwargs: Any) -> torch.Tensor:
    """The latents of a run of the source and its edit from the same noise."""
    kwargs.setdefault("latents", latents())
    with ac.control(pipe, *controls, record=False):
        return tiny.draw(pipe, prompts, **kwargs)


def call(kind: str, at: int = 0, seed: int = 0) -> Call:
    """A call with random queries, keys and values for two pictures of 2 x 2 latents and 24 text tokens."""
    generator = torch.Generator().manual_seed(seed)
    site = next(site for site in SITES if site.kind == kind)
    keys = 4 if kind == "self" else 24
    query = torch.randn(2, 2, 4, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, keys, 8, generator=generator)
    grid = TokenLayout.of_latents((1, 2, 2))
    return Call(
        site, step(at), "cond", query, key, value, 0.3, grid, grid if kind == "self" else TokenLayout.of_text(24)
    )


def attention(made: Call) -> torch.Tensor:
    """The output of a call with its streams, by definition."""

    def looked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
        scores = query @ key.mT * made.scale
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(dim=-1) @ value

    output = made.base_weight * looked(made.query, made.key, made.value, made.mask)
    for stream in made.streams:
        query = made.query if stream.query is None else stream.query
        output = output + stream.weight * looked(query, stream.key, stream.value, stream.mask)
    return output


def pair(prompt: str = EDIT, images: int = 1) -> Any:
    """A sampling of the source and one edit on a 2 x 2 grid."""
    return sampling([SOURCE, prompt], images=images)


def picture(width: int = 32, height: int = 32) -> Image.Image:
    """A smooth picture with something in it."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 / width, y * 255 / height, 128 + 0 * x], axis=-1)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = (230, 30, 30)
    return Image.fromarray(pixels.astype(np.uint8))
