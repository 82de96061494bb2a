# mypy: disable-error-code="no-untyped-def"
"""Attention under sparse blocks in Triton, forward: walks the lists of a row, applies masks in partial blocks only.

Notation as in `groups_triton`. A tile is a whole block or an equal part of one: a block of queries is made by
QUERY_BLOCK / BLOCK_M programs, and each block of keys is taken in KEY_BLOCK / BLOCK_N steps. Arguments of what a mask
does not have are None, and what they would do is compiled away: `query_first` and the like where blocks follow each
other evenly, `pattern_idx` and `patterns`, `hidden`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnctrl.kernels.groups_triton import FLOOR, LN_2, LOG2_E, dot, load_tile, store_tile


@triton.jit
def block_bounds(first, length, block, tokens, SIZE: tl.constexpr):
    """The first token of a block, int64, and how many it has (or more, where it is not the last and all are there)."""
    if first is None:
        start = block.to(tl.int64) * SIZE
        return start, tokens - start
    else:
        return tl.load(first + block).to(tl.int64), tl.load(length + block).to(tl.int64)


@triton.jit
def pattern_tile(
    patterns,
    number,
    own,
    walked,
    OWN_BLOCK: tl.constexpr,
    WALKED_BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    WALKED: tl.constexpr,
):
    """bool (OWN, WALKED): the part of a pattern that begins at (own, walked), the walked axis being that of the lists.

    patterns: int64 (patterns, OWN_BLOCK, words), a word for every 64 tokens that are walked, the first in bit 0. Bits,
    because a byte per pair would take an address per pair: registers that the tiles have not.
    """
    WORDS: tl.constexpr = (WALKED_BLOCK + 63) // 64
    w = tl.arange(0, WALKED)[None, :]
    at = patterns + (number.to(tl.int64) * OWN_BLOCK + own + tl.arange(0, OWN)) * WORDS
    if WALKED <= 64:
        word = tl.load(at + walked // 64)[:, None]
        return ((word >> (walked % 64 + w)) & 1) != 0
    else:
        word = tl.where(w < 64, tl.load(at)[:, None], tl.load(at + 1)[:, None])
        return ((word >> (w % 64)) & 1) != 0


@triton.jit
def _attend(
    acc,
    total,
    top,
    query,
    key,
    value,
    col_idx,
    pattern_idx,
    count,
    patterns,
    hidden,
    key_first,
    key_length,
    key_scale,
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
    """Take `count` blocks of keys into the running sums. scale: log2(e) times the attention's."""
    PAD: tl.constexpr = HEAD_DIM != BLOCK_D
    STEPS: tl.constexpr = KEY_BLOCK // BLOCK_N
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    for i in range(count * STEPS):
        block = tl.load(col_idx + i // STEPS)
        start, length = block_bounds(key_first, key_length, block, keys, KEY_BLOCK)
        column = i % STEPS * BLOCK_N
        first = start + column
        left = length - column
        k = load_tile(
            key + first * key_t + (n[None, :] * key_t + d[:, None] * key_d),
            left, n[None, :], d[:, None], PARTIAL, PAD, HEAD_DIM,
        )  # fmt: skip
        # The scale is applied to the product: in bf16 keys it would be rounded, and then multiplied by the logits.
        scores = dot(query, k, None, PRECISION)
        if key_scale is not None:
            scores = scores.to(tl.float32) * tl.load(key_scale + block)
        if PARTIAL:
            seen = (n < left)[None, :]
            if hidden is not None:
                seen = seen & (tl.load(hidden + first + n, mask=n < left, other=1) == 0)[None, :]
            if patterns is not None:
                number = tl.load(pattern_idx + i // STEPS)
                seen = seen & pattern_tile(patterns, number, row, column, QUERY_BLOCK, KEY_BLOCK, BLOCK_M, BLOCK_N)
            scores = tl.where(seen, scores, float("-inf"))
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
def block_forward_kernel(
    query,
    key,
    value,
    output,
    lse,
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
    query_scale,
    key_scale,
    columns,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (batch * heads * rows * QUERY_BLOCK / BLOCK_M,), tiles fastest, so that a head's keys stay in L2.

    rows, columns: blocks of queries and of keys. lse: contiguous (batch, heads, queries). list_b, list_h, hidden_b:
    strides, 0 where shared. query_scale, key_scale: contiguous float32 (batch, heads, blocks), what the integers of a
    quantised query and key stand for; None where these are floats.
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
    q = load_tile(
        query + batch * query_b + head * query_h + first * query_t + (m[:, None] * query_t + d[None, :] * query_d),
        left, m[:, None], d[None, :], True, PAD, HEAD_DIM,
    )  # fmt: skip
    key += batch * key_b + head * key_h
    value += batch * value_b + head * value_h
    if hidden is not None:
        hidden += batch * hidden_b
    at = batch * list_b + head * list_h + block
    full = tl.load(full_start + at)
    partial = tl.load(partial_start + at)
    # A part of a short block may have no token: it then walks no list.
    some_full = tl.where(left > 0, tl.load(full_count + at), 0)
    some_partial = tl.where(left > 0, tl.load(partial_count + at), 0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), FLOOR, tl.float32)
    scale *= LOG2_E
    if query_scale is not None:
        scale *= tl.load(query_scale + plane * rows + block)
        key_scale += plane * columns
    acc, total, top = _attend(
        acc, total, top, q, key, value, col_idx + full, None, some_full, None, None, key_first, key_length, key_scale,
        row, keys, scale, key_t, key_d, value_t, value_d,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, QUERY_BLOCK, KEY_BLOCK, False, PRECISION,
    )  # fmt: skip
    if pattern_idx is not None:
        pattern_idx += partial
    acc, total, top = _attend(
        acc, total, top, q, key, value, col_idx + partial, pattern_idx, some_partial, patterns, hidden, key_first,
        key_length, key_scale, row, keys, scale, key_t, key_d, value_t, value_d,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, QUERY_BLOCK, KEY_BLOCK, True, PRECISION,
    )  # fmt: skip
    blind = total == 0
    acc /= tl.where(blind, 1.0, total)[:, None]
    sums = tl.where(blind, float("-inf"), (top + tl.math.log2(tl.where(blind, 1.0, total))) * LN_2)
    tl.store(lse + plane * queries + first + m, sums, mask=m < left)
    at_output = output + batch * output_b + head * output_h + first * output_t
    store_tile(at_output, acc, output_t, output_d, left, HEAD_DIM, BLOCK_D, BLOCK_M)
