"""Re-ttention: what a very sparse attention left out of the softmax is carried over from an occasional dense step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from attnctrl.control import Control, Where, Window, param
from attnctrl.controls.sparse.common import BOTH, LATENTS, Sequence, Sparse, block_size, falls_back
from attnctrl.kernels import BlockAxis, SparseBlocks, attention_with_lse, block_attention, blocks_from_rule, why_full
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Step


def local_blocks(frames: int, tokens: int, width: int, block: int) -> tuple[BlockAxis, SparseBlocks]:
    """Tokens at most `width` // 2 apart within their frames, the same in every pair of frames; blocks of each frame."""
    one = BlockAxis((tokens,), block)
    near = blocks_from_rule(lambda b, h, q, k: (q - k).abs() <= width // 2, one, one)
    axis, times = BlockAxis((tokens,) * frames, block), (1, 1, frames, frames)
    pattern = None if near.pattern is None else near.pattern.repeat(times)
    return axis, SparseBlocks(near.visited.repeat(times), axis, axis, pattern=pattern, patterns=near.patterns)


class Kept(NamedTuple):
    """What a dense step leaves behind. step: its index.

    ratio: rho, float32 (batch, heads, queries, 1), the visited share of the softmax's sum. residual: the rest of the
    output, (batch, heads, queries, head_dim), or None.
    """

    step: int
    ratio: torch.Tensor
    residual: torch.Tensor | None


def kept_of(
    step: int, dense: tuple[torch.Tensor, torch.Tensor], sparse: tuple[torch.Tensor, torch.Tensor], residual: bool
) -> Kept:
    """rho = exp(lse of the visited - lse of all), and dense - rho * sparse: exactly what the others contribute."""
    ratio = (sparse[1] - dense[1]).exp()[..., None]
    rest = dense[0] - (ratio * sparse[0]).to(dense[0].dtype) if residual else None
    return Kept(step, ratio.detach(), None if rest is None else rest.detach())


def reshaped(output: torch.Tensor, kept: Kept, steps: int, drift: float) -> torch.Tensor:
    """min(rho + drift * (steps - 1), 1) * output + residual, so many steps after the dense one."""
    ratio = kept.ratio + drift * (steps - 1)
    scaled = (torch.maximum(kept.ratio, ratio.clamp(max=1.0)) * output).to(output.dtype)
    return scaled if kept.residual is None else scaled + kept.residual


@dataclass(frozen=True)
class Rettention(Control):
    """Re-ttention (NeurIPS 2025): a few percent of the keys, rescaled to their share of the full softmax.

    Queries see the keys within `density` of a frame's tokens around their own place, in every frame. Every `refresh`-th
    step is dense, and keeps for each query the visited keys' share rho of the softmax's sum, and the output's other
    part; the steps between give rho * sparse output + that part, with rho growing by `drift` a step. Defaults:
    CogVideoX-2B; PixArt window=Window(0.25, 1), HunyuanDiT window=Window(0.2, 1).

    What is kept takes as much memory as the outputs of all layers, twice with guidance; residual=False keeps rho alone.
    It is kept by site and branch with the number of its step, so that calls that a cache skips do no harm: a layer
    without a recent dense step makes one.

    Departures: rho stops at 1, which the official code exceeds; the part is kept before the output projection, where
    it is the same. Text sees all and is seen by all. Families: all with self- or joint attention among latents.
    """

    paper: ClassVar[str] = "Re-ttention, NeurIPS 2025"
    fixes: ClassVar[str] = "slow generation at very high sparsity"

    density: float = param(0.03125, "share of a frame's tokens that a query sees in each frame", 0.0001, 1)
    refresh: int = param(5, "steps from one dense step to the next", 1, 1000)
    drift: float = param(0.04, "by how much the visited share grows each step", 0, 1)
    residual: bool = param(True, "whether what the other keys contributed is kept")
    block: int = block_size(128)
    fall_back: bool = falls_back()
    window: Window = field(default=Window(0.3, 1.0), kw_only=True)
    where: Where = field(default=LATENTS, kw_only=True)
    branches: tuple[str, ...] = field(default=BOTH, kw_only=True)

    def begin(self, sampling: Sampling) -> Sparse:
        return Sparse(self, sampling)

    def is_due(self, kept: Kept | None, step: Step) -> bool:
        """Whether this step is dense: none has been since the last step that should have been, or it is this one."""
        return kept is None or kept.step == step.index or kept.step < step.index // self.refresh * self.refresh

    def attend(self, call: Call, state: Any) -> torch.Tensor | None:
        sequence, device = Sequence.of(call, self.name), call.query.device

        def make() -> SparseBlocks:
            frames, tokens = sequence.grid[0], sequence.grid[1] * sequence.grid[2]
            width = 2 * tokens if self.density == 1 else int(tokens * self.density)
            axis, near = local_blocks(frames, tokens, width, self.block)
            return sequence.fixed(axis, near.visited, device, near.pattern, near.patterns)

        mask = state.once((sequence, device), make)
        why = why_full(call.query, mask) if self.fall_back else ""
        if why:
            state.visited(call, 1.0, "full", why)
            return None
        visible, at = state.visible(call, mask, None), ("kept", call.site.name, call.branch)
        kept, parts = state.made.get(at), (call.query, call.key, call.value)
        if self.is_due(kept, call.step):
            dense = attention_with_lse(*parts, call.seen, call.scale)
            output, lse, _ = block_attention(*parts, visible, call.scale, with_lse=True)
            assert lse is not None
            state.made[at] = kept_of(call.step.index, dense, (output, lse), self.residual)
            state.visited(call, 1.0, "full", "a dense step")
            return dense[0]
        sparse = block_attention(*parts, visible, call.scale)
        state.visited(call, mask.density(), sparse.form)
        return reshaped(sparse.output, kept, call.step.index - kept.step, self.drift)
