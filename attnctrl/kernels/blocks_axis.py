"""How the tokens of one side of an attention are cut into blocks, segment by segment."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

BLOCK_SIZES = (4, 8, 16, 32, 64, 128)
"""Tokens per block. 64 and 128 are what GPUs are fast at; those below are for small models."""
SMALLEST_TILE = 16
"""Of the kernels; attention in smaller blocks is computed under a dense mask."""


@dataclass(frozen=True)
class BlockAxis:
    """Tokens in segments, each cut into blocks of `size` from its own first token on; a segment's last may be short.

    segments: tokens of each segment, in order. Text of 226 tokens before a video takes (226, 17550), so that the
    video's blocks begin at its first token; tiles of a grid that do not divide it are a segment each.
    size: one of BLOCK_SIZES.

    Raises:
        ValueError: a segment without tokens, none at all, or another size.
    """

    segments: tuple[int, ...]
    size: int

    def __post_init__(self) -> None:
        if not self.segments or min(self.segments) < 1:
            raise ValueError(f"Segments are {self.segments}: give at least one, each of one token or more.")
        if self.size not in BLOCK_SIZES:
            raise ValueError(f"Blocks of {self.size} tokens: choose one of {', '.join(map(str, BLOCK_SIZES))}.")

    @property
    def tokens(self) -> int:
        return sum(self.segments)

    @property
    def blocks(self) -> int:
        return sum(-(-segment // self.size) for segment in self.segments)

    @property
    def uniform(self) -> bool:
        """Whether block i begins at token i * size: at most the very last block is short."""
        return all(segment % self.size == 0 for segment in self.segments[:-1])

    def bounds(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """First token and number of tokens of each block, int32 (blocks,); kept per device."""
        return _bounds(self, torch.device(device))

    def slots(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Each slot's token, int64 (blocks, size), and whether it has one, bool; slots beyond a block have its last."""
        return _slots(self, torch.device(device))

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, channels) as (batch, heads, blocks, size, channels); 0 where a slot has no token."""
        if self.uniform:
            missing = self.blocks * self.size - self.tokens
            padded = F.pad(tensor, (0, 0, 0, missing)) if missing else tensor
            return padded.unflatten(2, (self.blocks, self.size))
        token, exists = self.slots(tensor.device)
        found = tensor.index_select(2, token.flatten()).unflatten(2, token.shape)
        return found.masked_fill(~exists[..., None], 0.0)

    def join(self, blocks: torch.Tensor) -> torch.Tensor:
        """The inverse of `cut`: (batch, heads, tokens, channels)."""
        flat = blocks.flatten(2, 3)
        if self.uniform:
            return flat[:, :, : self.tokens]
        return flat.index_select(2, _slot_of_token(self, blocks.device))

    def block_of_token(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's block and its place there, int64 (tokens,)."""
        slot = _slot_of_token(self, torch.device(device))
        return slot // self.size, slot % self.size


@lru_cache(maxsize=64)
def _bounds(axis: BlockAxis, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    first, length, start = [], [], 0
    for segment in axis.segments:
        for offset in range(0, segment, axis.size):
            first.append(start + offset)
            length.append(min(axis.size, segment - offset))
        start += segment
    with torch.inference_mode(False):  # kept, so they must serve training too
        return tuple(torch.tensor(values, dtype=torch.int32, device=device) for values in (first, length))  # type: ignore[return-value]


@lru_cache(maxsize=64)
def _slots(axis: BlockAxis, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    first, length = axis.bounds(device)
    with torch.inference_mode(False):
        place = torch.arange(axis.size, device=device)
        token = first.long()[:, None] + torch.minimum(place, length[:, None] - 1)
        return token, place < length[:, None]


@lru_cache(maxsize=64)
def _slot_of_token(axis: BlockAxis, device: torch.device) -> torch.Tensor:
    first, length = axis.bounds(device)
    with torch.inference_mode(False):
        blocks = torch.arange(axis.blocks, device=device)
        block = blocks.repeat_interleave(length.long(), output_size=axis.tokens)
        return block * axis.size + torch.arange(axis.tokens, device=device) - first.long()[block]
