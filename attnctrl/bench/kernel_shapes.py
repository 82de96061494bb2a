"""What `bench kernels` attends over: sequences of joint-attention models, and masks that controls make there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnctrl.kernels import TokenGroups
from attnctrl.kernels.tiles import tile_maps

TILE = 128
"""The tiles that the visited share is counted in."""


@dataclass(frozen=True)
class Shape:
    """A joint sequence, in this order: text, one prompt per entity, and latents of a square picture, row by row."""

    name: str
    side: int
    text: int
    entities: int
    entity_tokens: int
    heads: int
    head_dim: int

    @property
    def before(self) -> int:
        """Tokens before the latents."""
        return self.text + self.entities * self.entity_tokens

    @property
    def tokens(self) -> int:
        return self.before + self.side**2


FLUX = (Shape("FLUX 1024^2", 64, 512, 6, 64, 24, 128), Shape("FLUX 2048^2", 128, 512, 6, 64, 24, 128))
SMALL = Shape("small", 16, 32, 6, 8, 2, 64)
LONG = Shape("4096 latents", 64, 32, 0, 0, 2, 64)
"""Where sparse blocks pay on a CPU too."""


def entity_prompts(shape: Shape) -> TokenGroups:
    """Each entity's prompt and the latents of its box see each other; latents and text see all of themselves.

    The boxes are a grid of three by two with a margin, so that some latents are in none.
    """
    shared = torch.zeros(1, shape.tokens, dtype=torch.int64)
    shared[:, : shape.text] = shared[:, shape.before :] = 1
    bits = shared | _entities(shape, margin=shape.side // 16)
    return TokenGroups(bits, bits)


def isolation(shape: Shape) -> TokenGroups:
    """Latents see those of their own cell of the grid, its entity's prompt and the text, which sees everything."""
    bits = _entities(shape, margin=0)
    query_bits, key_bits = bits.clone(), bits.clone()
    text, everyone = 1, 1 << (shape.entities + 1)
    query_bits[:, : shape.text] = everyone
    query_bits[:, shape.before :] |= text
    key_bits[:, : shape.text] = text
    key_bits |= everyone
    return TokenGroups(query_bits, key_bits)


def _entities(shape: Shape, margin: int) -> torch.Tensor:
    """Bits (1, tokens): bit 1 + i for entity i's prompt and the latents of its box."""
    bits = torch.zeros(1, shape.tokens, dtype=torch.int64)
    places = torch.arange(shape.side)
    columns, rows = 3, -(-shape.entities // 3)
    for entity in range(shape.entities):
        start = shape.text + entity * shape.entity_tokens
        bits[:, start : start + shape.entity_tokens] |= 2 << entity
        inside = [
            (places >= cell * shape.side // cells + margin) & (places < (cell + 1) * shape.side // cells - margin)
            for cell, cells in ((entity // columns, rows), (entity % columns, columns))
        ]
        box = (inside[0][:, None] & inside[1][None, :]).flatten()
        bits[:, shape.before :] |= box.long() * (2 << entity)
    return bits


MASKS: dict[str, Callable[[Shape], TokenGroups]] = {"entity prompts": entity_prompts, "isolation": isolation}


def share_allowed(groups: TokenGroups) -> float:
    """The share of (query, key) pairs that the mask allows."""
    allowed = sum(int(((bits & groups.key_bits[0]) != 0).sum()) for bits in groups.query_bits[0])
    return allowed / (groups.queries * groups.keys)


def share_visited(groups: TokenGroups) -> float:
    """The share of tiles that a kernel visits: what regions that lie side by side leave of the saving."""
    return float(tile_maps(groups, TILE, TILE)[0].float().mean())
