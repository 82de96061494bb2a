"""What tests of subjects share: two subjects, runs with their references, and calls without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

import attnctrl as ac
from attnctrl.controls.subjects.rows import reference_prompts
from attnctrl.sites import Call, TokenLayout
from tests import tiny
from tests.methods import SITES, step

PROMPT = "a cat and a dog"
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def picture(seed: int, side: int = 32) -> Image.Image:
    """Noise with a flat colour in the middle."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
    pixels[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = rng.integers(0, 255, 3)
    return Image.fromarray(pixels)


def middle(side: int = 32) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = True
    return mask


def two(strength: float = 1.0, placed: bool = True, second: int = 2) -> tuple[ac.Subject, ac.Subject]:
    """A cat on the left and a dog on the right; second: the seed of the dog's picture."""
    regions = (LEFT, RIGHT) if placed else (None, None)
    return (
        ac.Subject("cat", picture(1), middle(), regions[0], strength),
        ac.Subject("dog", picture(second), middle(), regions[1], strength),
    )


def latents(rows: int, same: int = 0) -> torch.Tensor:
    """The start of each row, (rows, 4, 16, 16)."""
    generator = torch.Generator().manual_seed(3 + same)
    return torch.randn(rows, 4, 16, 16, generator=generator)


def draw(
    pipe: Any, subjects: Sequence[ac.Subject], *controls: ac.Control, prompts: Any = (PROMPT,), **kwargs: Any
) -> Any:
    """The latents of a run of pictures and their references."""
    texts = [*prompts, *reference_prompts(subjects)]
    kwargs.setdefault("latents", latents(len(texts)))
    with ac.control(pipe, *controls, record=False):
        return tiny.draw(pipe, texts, **kwargs)


def call(rows: int = 3, kind: str = "self", at: int = 0, seed: int = 0) -> Call:
    """A call with random queries, keys and values for pictures of 2 x 2 latents."""
    generator = torch.Generator().manual_seed(seed)
    site = next(site for site in SITES if site.kind == kind)
    keys = 4 if kind == "self" else 24
    query = torch.randn(rows, 2, 4, 8, generator=generator)
    key, value = torch.randn(2, rows, 2, keys, 8, generator=generator)
    grid = TokenLayout.of_latents((1, 2, 2))
    of_keys = grid if kind == "self" else TokenLayout.of_text(24)
    return Call(site, step(at), "cond", query, key, value, 0.3, grid, of_keys)
