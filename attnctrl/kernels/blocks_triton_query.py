# mypy: disable-error-code="no-untyped-def"
"""Attention under sparse blocks in Triton, backward: the query's gradient.

Equations in `groups_triton_query`, notation in `blocks_triton`. No atomics: gradients are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnctrl.kernels.blocks_triton import block_bounds, pattern_tile
from attnctrl.kernels.groups_triton import LOG2_E, dot, load_tile, store_tile


@triton.jit
def _query_gradient(
    acc,
    query,
    grad,
    lse,
    offset,
    key,
    value,
    col_idx,
    pattern_idx,
    count,
    patterns,
    hidden,
    key_first,
    key_length,
    row,
    keys,
    scale,
    key_t,
    key_d,
    value_t,
    value_d,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PAD: tl.constexpr = HEAD_DIM != BLOCK_D
    STEPS: tl.constexpr = KEY_BLOCK // BLOCK_N
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    for i in range(count * STEPS):
        start, length = block_bounds(key_first, key_length, tl.load(col_idx + i // STEPS), keys, KEY_BLOCK)
        column = i % STEPS * BLOCK_N
        first = start + column
        left = length - column
        k = load_tile(
            key + first * key_t + (n[:, None] * key_t + d[None, :] * key_d),
            left, n[:, None], d[None, :], PARTIAL, PAD, HEAD_DIM,
        )  # fmt: skip
        v = load_tile(
            value + first * value_t + (n[:, None] * value_t + d[None, :] * value_d),
            left, n[:, None], d[None, :], PARTIAL, PAD, HEAD_DIM,
        )  # fmt: skip
        probs = tl.math.exp2(dot(query, tl.trans(k), None, PRECISION) * scale - lse[:, None])
        if PARTIAL:
            seen = (n < left)[None, :]
            if hidden is not None:
                seen = seen & (tl.load(hidden + first + n, mask=n < left, other=1) == 0)[None, :]
            if patterns is not None:
                number = tl.load(pattern_idx + i // STEPS)
                seen = seen & pattern_tile(patterns, number, row, column, QUERY_BLOCK, KEY_BLOCK, BLOCK_M, BLOCK_N)
            probs = tl.where(seen, probs, 0.0)
        grad_scores = probs * (dot(grad, tl.trans(v), None, PRECISION) - offset[:, None])
        acc = dot(grad_scores.to(k.dtype), k, acc, PRECISION)
    return acc


@triton.jit
def block_query_kernel(
    query,
    key,
    value,
    output,
    grad_output,
    lse,
    grad_lse,
    grad_query,
    offsets,
    col_idx,
    full_start,
    full_count,
    partial_start,
    partial_count,
    pattern_idx,
    patterns,
    hidden,
    query_first,
    query_length,
    key_first,
    key_length,
    heads,
    queries,
    keys,
    scale,
    rows,
    list_b,
    list_h,
    hidden_b,
    query_b,
    query_h,
    query_t,
    query_d,
    key_b,
    key_h,
    key_t,
    key_d,
    value_b,
    value_h,
    value_t,
    value_d,
    output_b,
    output_h,
    output_t,
    output_d,
    grad_b,
    grad_h,
    grad_t,
    grad_d,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: that of the forward kernel. grad_query has the strides of output.

    Also writes offsets = rowsum(dO O) - dLSE, which `block_key_value_kernel` reads. lse, grad_lse and offsets are
    contiguous (batch, heads, queries), natural logarithms.
    """
    PARTS: tl.constexpr = QUERY_BLOCK // BLOCK_M
    tile = tl.program_id(0) % (rows * PARTS)
    plane = (tl.program_id(0) // (rows * PARTS)).to(tl.int64)
    batch, head = plane // heads, plane % heads
    block = tile // PARTS
    row = tile % PARTS * BLOCK_M
    start, length = block_bounds(query_first, query_length, block, queries, QUERY_BLOCK)
    first = start + row
    left = length - row
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    PAD: tl.constexpr = HEAD_DIM != BLOCK_D
    at_output = batch * output_b + head * output_h + first * output_t
    o = load_tile(
        output + at_output + (m[:, None] * output_t + d[None, :] * output_d),
        left, m[:, None], d[None, :], True, PAD, HEAD_DIM,
    )  # fmt: skip
    grad = load_tile(
        grad_output + batch * grad_b + head * grad_h + first * grad_t + (m[:, None] * grad_t + d[None, :] * grad_d),
        left, m[:, None], d[None, :], True, PAD, HEAD_DIM,
    )  # fmt: skip
    at = plane * queries + first + m
    offset = tl.sum(o.to(tl.float32) * grad.to(tl.float32), 1) - tl.load(grad_lse + at, mask=m < left, other=0.0)
    tl.store(offsets + at, offset, mask=m < left)
    sums = tl.load(lse + at, mask=m < left, other=0.0)
    sums = tl.where(sums == float("-inf"), float("inf"), sums * LOG2_E)  # P = 0 in a row that sees nothing
    q = load_tile(
        query + batch * query_b + head * query_h + first * query_t + (m[:, None] * query_t + d[None, :] * query_d),
        left, m[:, None], d[None, :], True, PAD, HEAD_DIM,
    )  # fmt: skip
    key += batch * key_b + head * key_h
    value += batch * value_b + head * value_h
    if hidden is not None:
        hidden += batch * hidden_b
    at_list = batch * list_b + head * list_h + block
    full = tl.load(full_start + at_list)
    partial = tl.load(partial_start + at_list)
    some_full = tl.where(left > 0, tl.load(full_count + at_list), 0)
    some_partial = tl.where(left > 0, tl.load(partial_count + at_list), 0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    acc = _query_gradient(
        acc, q, grad, sums, offset, key, value, col_idx + full, None, some_full, None, None, key_first, key_length,
        row, keys, scale * LOG2_E, key_t, key_d, value_t, value_d,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, QUERY_BLOCK, KEY_BLOCK, False, PRECISION,
    )  # fmt: skip
    if pattern_idx is not None:
        pattern_idx += partial
    acc = _query_gradient(
        acc, q, grad, sums, offset, key, value, col_idx + partial, pattern_idx, some_partial, patterns, hidden,
        key_first, key_length, row, keys, scale * LOG2_E, key_t, key_d, value_t, value_d,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, QUERY_BLOCK, KEY_BLOCK, True, PRECISION,
    )  # fmt: skip
    store_tile(grad_query + at_output, acc * scale, output_t, output_d, left, HEAD_DIM, BLOCK_D, BLOCK_M)
