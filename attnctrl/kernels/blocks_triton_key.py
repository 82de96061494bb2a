# mypy: disable-error-code="no-untyped-def"
"""Attention under sparse blocks in Triton, backward: the gradients of key and value, after that of the query.

Equations in `groups_triton_query`, notation in `blocks_triton`; the lists' rows are blocks of keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnctrl.kernels.blocks_triton import block_bounds, pattern_tile
from attnctrl.kernels.groups_triton import LOG2_E, dot, load_tile, store_tile


@triton.jit
def _key_value_gradient(
    grad_key,
    grad_value,
    key,
    value,
    key_seen,
    query,
    grad_output,
    lse,
    offsets,
    col_idx,
    pattern_idx,
    count,
    patterns,
    query_first,
    query_length,
    column,
    queries,
    scale,
    query_t,
    query_d,
    grad_t,
    grad_d,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """key_seen: bool (BLOCK_N,), false for keys that are hidden or not there; None where all are seen."""
    PAD: tl.constexpr = HEAD_DIM != BLOCK_D
    STEPS: tl.constexpr = QUERY_BLOCK // BLOCK_M
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    for i in range(count * STEPS):
        start, length = block_bounds(query_first, query_length, tl.load(col_idx + i // STEPS), queries, QUERY_BLOCK)
        row = i % STEPS * BLOCK_M
        first = start + row
        left = length - row
        q = load_tile(
            query + first * query_t + (m[:, None] * query_t + d[None, :] * query_d),
            left, m[:, None], d[None, :], PARTIAL, PAD, HEAD_DIM,
        )  # fmt: skip
        grad = load_tile(
            grad_output + first * grad_t + (m[:, None] * grad_t + d[None, :] * grad_d),
            left, m[:, None], d[None, :], PARTIAL, PAD, HEAD_DIM,
        )  # fmt: skip
        if PARTIAL:
            sums = tl.load(lse + first + m, mask=m < left, other=float("-inf"))
            offset = tl.load(offsets + first + m, mask=m < left, other=0.0)
        else:
            sums = tl.load(lse + first + m)
            offset = tl.load(offsets + first + m)
        sums = tl.where(sums == float("-inf"), float("inf"), sums * LOG2_E)
        # Transposed, (keys, queries): the products below then take it as it is.
        probs = tl.math.exp2(dot(key, tl.trans(q), None, PRECISION) * scale - sums[None, :])
        if PARTIAL:
            if patterns is not None:
                number = tl.load(pattern_idx + i // STEPS)
                seen = pattern_tile(patterns, number, column, row, KEY_BLOCK, QUERY_BLOCK, BLOCK_N, BLOCK_M)
                probs = tl.where(seen, probs, 0.0)
            if key_seen is not None:
                probs = tl.where(key_seen[:, None], probs, 0.0)
        grad_value = dot(probs.to(grad.dtype), grad, grad_value, PRECISION)
        grad_scores = probs * (dot(value, tl.trans(grad), None, PRECISION) - offset[None, :])
        grad_key = dot(grad_scores.to(q.dtype), q, grad_key, PRECISION)
    return grad_key, grad_value


@triton.jit
def block_key_value_kernel(
    query,
    key,
    value,
    grad_output,
    lse,
    offsets,
    grad_key,
    grad_value,
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
    """Grid: (batch * heads * rows * KEY_BLOCK / BLOCK_N,). rows: blocks of keys. grad_key, grad_value: contiguous."""
    PARTS: tl.constexpr = KEY_BLOCK // BLOCK_N
    tile = tl.program_id(0) % (rows * PARTS)
    plane = (tl.program_id(0) // (rows * PARTS)).to(tl.int64)
    batch, head = plane // heads, plane % heads
    block = tile // PARTS
    column = tile % PARTS * BLOCK_N
    start, length = block_bounds(key_first, key_length, block, keys, KEY_BLOCK)
    first = start + column
    left = length - column
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    PAD: tl.constexpr = HEAD_DIM != BLOCK_D
    k = load_tile(
        key + batch * key_b + head * key_h + first * key_t + (n[:, None] * key_t + d[None, :] * key_d),
        left, n[:, None], d[None, :], True, PAD, HEAD_DIM,
    )  # fmt: skip
    v = load_tile(
        value + batch * value_b + head * value_h + first * value_t + (n[:, None] * value_t + d[None, :] * value_d),
        left, n[:, None], d[None, :], True, PAD, HEAD_DIM,
    )  # fmt: skip
    if hidden is None:
        key_seen = None
    else:
        key_seen = tl.load(hidden + batch * hidden_b + first + n, mask=n < left, other=1) == 0
    query += batch * query_b + head * query_h
    grad_output += batch * grad_b + head * grad_h
    lse += plane * queries
    offsets += plane * queries
    at_list = batch * list_b + head * list_h + block
    full = tl.load(full_start + at_list)
    partial = tl.load(partial_start + at_list)
    some_full = tl.where(left > 0, tl.load(full_count + at_list), 0)
    some_partial = tl.where(left > 0, tl.load(partial_count + at_list), 0)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dk, dv = _key_value_gradient(
        dk, dv, k, v, None, query, grad_output, lse, offsets, col_idx + full, None, some_full, None,
        query_first, query_length, column, queries, scale * LOG2_E, query_t, query_d, grad_t, grad_d,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, QUERY_BLOCK, KEY_BLOCK, False, PRECISION,
    )  # fmt: skip
    if pattern_idx is not None:
        pattern_idx += partial
    dk, dv = _key_value_gradient(
        dk, dv, k, v, key_seen, query, grad_output, lse, offsets, col_idx + partial, pattern_idx, some_partial,
        patterns, query_first, query_length, column, queries, scale * LOG2_E, query_t, query_d, grad_t, grad_d,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, QUERY_BLOCK, KEY_BLOCK, True, PRECISION,
    )  # fmt: skip
    at = (plane * keys + first) * HEAD_DIM
    store_tile(grad_key + at, dk * scale, HEAD_DIM, 1, left, HEAD_DIM, BLOCK_D, BLOCK_N)
    store_tile(grad_value + at, dv, HEAD_DIM, 1, left, HEAD_DIM, BLOCK_D, BLOCK_N)
