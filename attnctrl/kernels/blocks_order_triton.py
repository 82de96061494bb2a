# mypy: disable-error-code="no-untyped-def"
"""Reorders tokens in Triton: each program copies some rows of one head, sixteen bytes at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnctrl.kernels.groups_autograd import on_device

ROWS = 32


@triton.jit
def order_kernel(
    source,
    target,
    order,
    heads,
    tokens,
    order_h,
    source_b,
    source_h,
    source_t,
    source_d,
    target_b,
    target_h,
    target_t,
    target_d,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: (batch * heads * tokens / ROWS,). order_h: its stride from head to head, 0 where they share it."""
    tiles = tl.cdiv(tokens, ROWS)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = plane // heads, plane % heads
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    token = tl.load(order + head * order_h + row, mask=row < tokens, other=0)
    inside = (row < tokens)[:, None] & (d < CHANNELS)[None, :]
    source += batch * source_b + head * source_h
    target += batch * target_b + head * target_h
    found = tl.load(source + token[:, None] * source_t + d[None, :] * source_d, mask=inside)
    tl.store(target + row.to(tl.int64)[:, None] * target_t + d[None, :] * target_d, found, mask=inside)


def move(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """tensor[b, h, order[h, i]] at (b, h, i), (batch, heads, tokens, channels); order: int64 (heads or 1, tokens)."""
    batch, heads, tokens, channels = tensor.shape
    moved = torch.empty_like(tensor)
    order = order.contiguous()
    with on_device(tensor.device):
        order_kernel[(batch * heads * triton.cdiv(tokens, ROWS),)](
            *(tensor, moved, order, heads, tokens, tokens if order.shape[0] > 1 else 0),
            *(*tensor.stride(), *moved.stride()),
            CHANNELS=channels,
            BLOCK_D=triton.next_power_of_2(channels),
            ROWS=ROWS,
        )
    return moved
