"""How large the tiles of the Triton kernels are, by head_dim and element type: what the offline gate compiles.

Not autotuned: a table costs no time at the first call of every resolution. The entries were chosen by compiling them
(`attnctrl.kernels.offline`), not by timing: those of HALF have no register spills, and wgmma on sm_90.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

HEAD_DIMS = (16, 32, 64, 128, 256)
"""Head dimensions that tiles are made for; others are padded to the next."""


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: queries x keys, and how many warps and pipeline stages work on it."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of the forward kernel and of the two backward ones."""

    forward: Tile
    query: Tile
    key_value: Tile


AMPERE, HOPPER, BLACKWELL = 80, 90, 100
"""Kinds of GPU, by the compute capability that begins them: mma, wgmma, tcgen05."""

HALF = {
    (AMPERE, 64): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (AMPERE, 128): Tiles(Tile(128, 32, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (HOPPER, 64): Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (HOPPER, 128): Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    (BLACKWELL, 64): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (BLACKWELL, 128): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
}
"""fp16 and bf16, by kind and head_dim; smaller heads take the 64."""

LARGE = Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))
"""fp16 and bf16, head_dim 129 to 256."""

SINGLE = {
    64: Tiles(Tile(32, 32, 4, 2), Tile(16, 32, 4, 2), Tile(32, 32, 8, 1)),
    128: Tiles(Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)),
    256: Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
"""float32 by head_dim: twice the bytes, and products made of three."""


def padded(head_dim: int) -> int:
    """The head_dim that the kernels compute with.

    Raises:
        ValueError: head_dim is above 256.
    """
    for size in HEAD_DIMS:
        if head_dim <= size:
            return size
    raise ValueError(f"head_dim {head_dim} is above {HEAD_DIMS[-1]}, the largest that the Triton kernels have.")


def tiles_for(head_dim: int, dtype: torch.dtype, capability: int) -> Tiles:
    """The tiles for a head_dim, an element type and a compute capability, such as 90.

    Raises:
        ValueError: an element type other than fp16, bf16 and float32, or a head_dim above 256.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"The Triton kernels take float16, bfloat16 and float32, not {dtype}.")
    size = max(padded(head_dim), 64)
    if dtype == torch.float32:
        return SINGLE[size]
    return LARGE if size > 128 else HALF[kind(capability), size]


def kind(capability: int) -> int:
    """AMPERE, HOPPER or BLACKWELL. Consumer Blackwell (12.x) has Ampere's instructions and shared memory."""
    if 100 <= capability < 120:
        return BLACKWELL
    return HOPPER if 90 <= capability < 100 else AMPERE


def dot_precision(dtype: torch.dtype, interpreted: bool) -> str:
    """How products are made: float32 ones of three on the tensor cores, about as exact. See `groups_triton.dot`."""
    if interpreted:
        return "upcast"
    return "tf32x3" if dtype == torch.float32 else "ieee"
