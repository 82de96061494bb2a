# mypy: disable-error-code="no-untyped-def"
"""Attention under token groups in Triton, forward: visits the tiles of a list, looks at bits in partial tiles only.

Notation of the kernels: one program makes one tile of BLOCK_M queries of one head; tiles of BLOCK_N keys come by list.
Every tensor comes with its four strides (batch, heads, tokens, head_dim), so no layout is copied. Whole tiles are
addressed in 64 bits, what is inside a tile in 32: `groups_autograd` sees to it that a tile spans less.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e30)
"""Below any score and yet finite: a row that saw nothing so far keeps this maximum, where -inf - -inf would be NaN."""
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(pointers, rows_left, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """A tile, 0 outside. ROWS, COLUMNS: whether rows may be missing, whether WIDTH channels are fewer than the tile's.

    rows, columns: the tile's indices along the two axes, shaped to broadcast, in either order.
    """
    if ROWS and COLUMNS:
        return tl.load(pointers, mask=(rows < rows_left) & (columns < WIDTH), other=0.0)
    elif ROWS:
        return tl.load(pointers, mask=rows < rows_left, other=0.0)
    elif COLUMNS:
        return tl.load(pointers, mask=columns < WIDTH, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def dot(left, right, acc, PRECISION: tl.constexpr):
    """left @ right (+ acc, unless None) in float32. PRECISION: Triton's `input_precision`, or "upcast".

    The interpreter multiplies the bit patterns of bf16 (to Triton 3.9 at least), so there they are widened first;
    tensor cores multiply bf16 exactly as well, so that the result is theirs up to the order of the sum.
    """
    if PRECISION == "upcast":
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc)
    else:
        return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def _attend(
    acc,
    total,
    top,
    query,
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
    """Take `count` tiles of keys into the running sums. scale: log2(e) times the attention's."""
    PAD: tl.constexpr = HEAD_DIM != BLOCK_D
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    for i in range(count):
        first = tl.load(tiles + i).to(tl.int64) * BLOCK_N
        left = keys - first
        k = load_tile(
            key + first * key_t + (n[None, :] * key_t + d[:, None] * key_d),
            left, n[None, :], d[:, None], PARTIAL, PAD, HEAD_DIM,
        )  # fmt: skip
        # The scale is applied to the product: in bf16 keys it would be rounded, and then multiplied by the logits.
        scores = dot(query, k, None, PRECISION)
        if PARTIAL:
            bits = tl.load(key_bits + first + n, mask=n < left, other=0)
            scores = tl.where((query_bits[:, None] & bits[None, :]) != 0, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        probs = tl.math.exp2(scores * scale - new_top[:, None])
        fade = tl.math.exp2(top - new_top)
        total = total * fade + tl.sum(probs, 1)
        v = load_tile(
            value + first * value_t + (n[:, None] * value_t + d[None, :] * value_d),
            left, n[:, None], d[None, :], PARTIAL, PAD, HEAD_DIM,
        )  # fmt: skip
        acc = dot(probs.to(v.dtype), v, acc * fade[:, None], PRECISION)
        top = new_top
    return acc, total, top


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    output,
    lse,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (batch * heads * query tiles,), tiles fastest, so that one head's keys and values stay in L2.

    lse: contiguous (batch, heads, queries). list_b, query_bits_b, key_bits_b: strides, 0 where samples share.
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
    q = load_tile(
        query + batch * query_b + head * query_h + first * query_t + (m[:, None] * query_t + d[None, :] * query_d),
        left, m[:, None], d[None, :], True, PAD, HEAD_DIM,
    )  # fmt: skip
    bits = tl.load(query_bits + batch * query_bits_b + first + m, mask=m < left, other=0)
    key += batch * key_b + head * key_h
    value += batch * value_b + head * value_h
    key_bits += batch * key_bits_b
    at = batch * list_b + row
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), FLOOR, tl.float32)
    scale *= LOG2_E
    acc, total, top = _attend(
        acc, total, top, q, bits, key, value, key_bits, col_idx + tl.load(full_start + at), tl.load(full_count + at),
        keys, scale, key_t, key_d, value_t, value_d, HEAD_DIM, BLOCK_D, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, bits, key, value, key_bits, col_idx + tl.load(partial_start + at),
        tl.load(partial_count + at),
        keys, scale, key_t, key_d, value_t, value_d, HEAD_DIM, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    blind = total == 0
    acc /= tl.where(blind, 1.0, total)[:, None]
    sums = tl.where(blind, float("-inf"), (top + tl.math.log2(tl.where(blind, 1.0, total))) * LN_2)
    tl.store(lse + plane * queries + first + m, sums, mask=m < left)
    at_output = output + batch * output_b + head * output_h + first * output_t
    store_tile(at_output, acc, output_t, output_d, left, HEAD_DIM, BLOCK_D, BLOCK_M)


@triton.jit
def store_tile(
    pointer, tile, stride_t, stride_d, left, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    """Write the first `left` rows of a (ROWS, BLOCK_D) tile at `pointer`, in the element type there."""
    m = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(
        pointer + (m * stride_t + d * stride_d),
        tile.to(pointer.dtype.element_ty),
        mask=(m < left) & (d < HEAD_DIM),
    )
