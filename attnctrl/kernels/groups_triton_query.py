# mypy: disable-error-code="no-untyped-def"
"""Attention under token groups in Triton, backward: the query's gradient.

With P the probabilities, computed again from the log-sum-exp: dV = P^T dO and dS = P (dP - rowsum(dO O) + dLSE).
Each program of the two backward kernels writes its own tile, with no atomics, so that the gradients are the same, bit
for bit, in every run. The notation is that of `groups_triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnctrl.kernels.groups_triton import LOG2_E, dot, load_tile, store_tile


@triton.jit
def _query_gradient(
    acc,
    query,
    grad,
    lse,
    offset,
    query_bits,
    key,
    value,
    key_bits,
    tiles,
    count,
    keys,
    scale,
    key_t,
    key_d,
    value_t,
    value_d,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PAD: tl.constexpr = HEAD_DIM != BLOCK_D
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    for i in range(count):
        first = tl.load(tiles + i).to(tl.int64) * BLOCK_N
        left = keys - first
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
            bits = tl.load(key_bits + first + n, mask=n < left, other=0)
            probs = tl.where((query_bits[:, None] & bits[None, :]) != 0, probs, 0.0)
        grad_scores = probs * (dot(grad, tl.trans(v), None, PRECISION) - offset[:, None])
        acc = dot(grad_scores.to(k.dtype), k, acc, PRECISION)
    return acc


@triton.jit
def query_kernel(
    query,
    key,
    value,
    output,
    grad_output,
    lse,
    grad_lse,
    grad_query,
    offsets,
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
    PRECISION: tl.constexpr,
):
    """Grid: (batch * heads * query tiles,). grad_query has the strides of output.

    Also writes offsets = rowsum(dO O) - dLSE, which `key_value_kernel` reads. lse, grad_lse and offsets are
    contiguous (batch, heads, queries), natural logarithms.
    """
    tiles = tl.cdiv(queries, BLOCK_M)
    row = tl.program_id(0) % tiles
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = plane // heads, plane % heads
    first = row.to(tl.int64) * BLOCK_M
    left = queries - first
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
    bits = tl.load(query_bits + batch * query_bits_b + first + m, mask=m < left, other=0)
    key += batch * key_b + head * key_h
    value += batch * value_b + head * value_h
    key_bits += batch * key_bits_b
    at_list = batch * list_b + row
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    acc = _query_gradient(
        acc, q, grad, sums, offset, bits, key, value, key_bits,
        col_idx + tl.load(full_start + at_list), tl.load(full_count + at_list),
        keys, scale * LOG2_E, key_t, key_d, value_t, value_d, HEAD_DIM, BLOCK_D, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    acc = _query_gradient(
        acc, q, grad, sums, offset, bits, key, value, key_bits,
        col_idx + tl.load(partial_start + at_list), tl.load(partial_count + at_list),
        keys, scale * LOG2_E, key_t, key_d, value_t, value_d, HEAD_DIM, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    store_tile(grad_query + at_output, acc * scale, output_t, output_d, left, HEAD_DIM, BLOCK_D, BLOCK_M)
