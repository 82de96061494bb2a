# mypy: disable-error-code="no-untyped-def"
"""Attention under token groups in Triton, backward: the gradients of key and value, after that of the query.

Equations in `groups_triton_query`, notation in `groups_triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnctrl.kernels.groups_triton import LOG2_E, dot, load_tile, store_tile


@triton.jit
def _key_value_gradient(
    grad_key,
    grad_value,
    key,
    value,
    key_bits,
    query,
    grad_output,
    lse,
    offsets,
    query_bits,
    tiles,
    count,
    queries,
    scale,
    query_t,
    query_d,
    grad_t,
    grad_d,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PAD: tl.constexpr = HEAD_DIM != BLOCK_D
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    for i in range(count):
        first = tl.load(tiles + i).to(tl.int64) * BLOCK_M
        left = queries - first
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
            bits = tl.load(query_bits + first + m, mask=m < left, other=0)
            probs = tl.where((key_bits[:, None] & bits[None, :]) != 0, probs, 0.0)
        grad_value = dot(probs.to(grad.dtype), grad, grad_value, PRECISION)
        grad_scores = probs * (dot(value, tl.trans(grad), None, PRECISION) - offset[None, :])
        grad_key = dot(grad_scores.to(q.dtype), q, grad_key, PRECISION)
    return grad_key, grad_value


@triton.jit
def key_value_kernel(
    query,
    key,
    value,
    grad_output,
    lse,
    offsets,
    grad_key,
    grad_value,
    query_bits,
    key_bits,
    col_idx,
    full_start,
    full_count,
    partial_start,
    partial_count,
    heads,
    queries,
    keys,
    scale,
    list_b,
    query_bits_b,
    key_bits_b,
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
    PRECISION: tl.constexpr,
):
    """Grid: (batch * heads * key tiles,); the list's rows are tiles of keys. grad_key, grad_value: contiguous."""
    tiles = tl.cdiv(keys, BLOCK_N)
    row = tl.program_id(0) % tiles
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = plane // heads, plane % heads
    first = row.to(tl.int64) * BLOCK_N
    left = keys - first
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
    bits = tl.load(key_bits + batch * key_bits_b + first + n, mask=n < left, other=0)
    query += batch * query_b + head * query_h
    grad_output += batch * grad_b + head * grad_h
    query_bits += batch * query_bits_b
    lse += plane * queries
    offsets += plane * queries
    at_list = batch * list_b + row
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dk, dv = _key_value_gradient(
        dk, dv, k, v, bits, query, grad_output, lse, offsets, query_bits,
        col_idx + tl.load(full_start + at_list), tl.load(full_count + at_list),
        queries, scale * LOG2_E, query_t, query_d, grad_t, grad_d, HEAD_DIM, BLOCK_D, BLOCK_M, False, PRECISION,
    )  # fmt: skip
    dk, dv = _key_value_gradient(
        dk, dv, k, v, bits, query, grad_output, lse, offsets, query_bits,
        col_idx + tl.load(partial_start + at_list), tl.load(partial_count + at_list),
        queries, scale * LOG2_E, query_t, query_d, grad_t, grad_d, HEAD_DIM, BLOCK_D, BLOCK_M, True, PRECISION,
    )  # fmt: skip
    at = (plane * keys + first) * HEAD_DIM
    store_tile(grad_key + at, dk * scale, HEAD_DIM, 1, left, HEAD_DIM, BLOCK_D, BLOCK_N)
    store_tile(grad_value + at, dv, HEAD_DIM, 1, left, HEAD_DIM, BLOCK_D, BLOCK_N)
