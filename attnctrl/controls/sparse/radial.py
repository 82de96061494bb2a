"""Radial attention: a fixed mask that thins out with the distance of two frames."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Where, Window, param
from attnctrl.controls.sparse.common import BOTH, Sequence, Sparse, block_size, falls_back, sink_frames
from attnctrl.kernels import BlockAxis
from attnctrl.sampling import Sampling
from attnctrl.sites import Call


def half_width(
    distance: int, tokens: int, decay: float, block: int, whole: int = 1, floor: float = 1.0
) -> float | None:
    """How far apart in their frames two tokens may lie whose frames are `distance` apart; None: nothing is kept.

    tokens: of a frame. With L = 2^bits(tokens) / 2^bits(distance): frames at most `whole` apart see each other whole,
    others within max(L * decay, floor * block); where L is below a block, only every int(block / L)-th frame is seen.
    """
    length = 2.0 ** (tokens.bit_length() - distance.bit_length())
    if length < block and distance % int(block / length) != 0:
        return None
    return float(tokens) if distance <= whole else max(length * decay, floor * block)


def band_blocks(tokens: int, width: float, block: int) -> torch.Tensor:
    """The blocks of a frame pair that a band |query - key| <= width fills enough: bool (blocks, blocks).

    Of a block's columns that the band meets, more than 60% must be filled by more than a third.
    """
    count = -(-tokens // block)
    place, first = torch.arange(tokens), torch.arange(count)[:, None] * block
    last = (first + block).clamp(max=tokens)
    rows = torch.minimum(last, place + int(width) + 1) - torch.maximum(first, place - int(width))
    filled = rows.clamp(min=0) / (last - first)  # (row blocks, columns)
    met, dense = (
        torch.zeros(count, count).index_add_(1, place // block, (filled > share).float()) for share in (0.0, 1 / 3)
    )
    return (met > 0) & (dense > 0.6 * met)


def radial_blocks(
    frames: int, tokens: int, decay: float, block: int, sink: int = 0, whole: int = 1, floor: float = 1.0
) -> torch.Tensor:
    """The visited blocks among the latents: bool (frames * blocks, frames * blocks), blocks of each frame its own.

    sink: first frames that every query sees whole. whole, floor: as in `half_width`.
    """
    count = -(-tokens // block)
    widths = [half_width(distance, tokens, decay, block, whole, floor) for distance in range(frames)]
    nothing = torch.zeros(count, count, dtype=torch.bool)
    known = {width: nothing if width is None else band_blocks(tokens, width, block) for width in set(widths)}
    frame = torch.arange(frames)
    maps = torch.stack([known[width] for width in widths])[(frame[:, None] - frame).abs()]
    maps[:, :sink] = True
    return maps.transpose(1, 2).reshape(frames * count, frames * count)


@dataclass(frozen=True)
class Radial(Control):
    """Radial attention (arXiv 2506.19852): the further apart two frames, the narrower the band of tokens that is seen.

    The mask is that of the official code, the same for all heads, layers, prompts and branches. Frames at most one
    apart see each other whole; those further apart see a band of half width max(2^bits(T) / 2^bits(d) * decay, block)
    of T tokens a frame at distance d, and beyond T / block frames only every so many-th frame. Defaults: Wan 2.1;
    for Wan 2.2 decay=0.8, for HunyuanVideo decay=0.95, sink=0, where=LATENTS. The paper's bands are
    2 T / 2^bits(T) times as wide: its rule is a decay of that.

    Of short or small clips, which are mostly neighbours and bands of one block, this leaves little out: there `whole`
    and `floor` thin it further than the paper does.

    Departures: each frame has blocks of its own, so that any resolution works; in the code blocks run through and a
    frame must fill them. Where the code says 128 in its rule of frames, this says `block`.

    Text sees all and is seen by all. Pictures have one frame and are seen whole. Families: Wan, HunyuanVideo,
    CogVideoX, LTX, Mochi.
    """

    paper: ClassVar[str] = "arXiv 2506.19852"
    fixes: ClassVar[str] = "slow video generation"

    decay: float = param(0.2, "factor of the width of the bands", 0, 1000)
    block: int = block_size(128)
    whole: int = param(1, "frames at most so far apart see each other whole; -1: not even a frame itself", -1, 4096)
    floor: float = param(1.0, "least half width of a band, in blocks", 0, 64)
    sink: int = sink_frames(1)
    fall_back: bool = falls_back()
    window: Window = field(default=Window(0.24, 1.0), kw_only=True)
    where: Where = field(default=Where(kinds=("self", "joint"), skip=1), kw_only=True)
    branches: tuple[str, ...] = field(default=BOTH, kw_only=True)

    def begin(self, sampling: Sampling) -> Sparse:
        return Sparse(self, sampling)

    def attend(self, call: Call, state: Any) -> torch.Tensor | None:
        sequence, device = Sequence.of(call, self.name), call.query.device

        def mask() -> Any:
            frames, height, width = sequence.grid
            axis = BlockAxis((height * width,) * frames, self.block)
            settings = self.decay, self.block, self.sink, self.whole, self.floor
            visited = radial_blocks(frames, height * width, *settings)
            return sequence.fixed(axis, visited[None, None], device)

        return state.attend(call, state.once((sequence, device), mask), self.fall_back)
