"""What `bench kernels` compares under sparse blocks: the form that is chosen, and FlexAttention, at given densities."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from attnctrl.bench.kernel_shapes import Shape
from attnctrl.kernels import BlockAxis, SparseBlocks, block_attention, top_blocks
from attnctrl.kernels.blocks_dispatch import choose

DENSITIES = (0.5, 0.2)

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


def random_blocks(shape: Shape, density: float, device: torch.device) -> SparseBlocks:
    """As many random blocks in every row of every head; the text before the picture has blocks of its own.

    128 tokens on a GPU, as there; on the CPU 64, or 16 where the sequence is short.
    """
    size = 128 if device.type == "cuda" else 64 if shape.tokens > 4096 else 16
    axis = BlockAxis((shape.before, shape.side**2), size)
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.rand(1, shape.heads, axis.blocks, axis.blocks, generator=generator, device=device)
    mask = SparseBlocks(top_blocks(scores, density), axis, axis)
    mask.density()  # counted here, so that nothing waits for it later
    return mask


def block_cases(shape: Shape, mask: SparseBlocks, device: torch.device) -> Iterator[tuple[str, Run]]:
    """(name, what to time); the name tells which form was chosen."""
    scale = shape.head_dim**-0.5

    def run(form: str) -> Run:
        return lambda q, k, v: (block_attention(q, k, v, mask, scale, form=form).output,)

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = choose(torch.empty(1, shape.heads, 1, shape.head_dim, dtype=dtype, device=device), mask, False)
    yield f"sparse blocks ({chosen})", run(chosen)
    if chosen == "masked":
        yield "sparse blocks (gather)", run("gather")
    yield "FlexAttention", run("flex")
