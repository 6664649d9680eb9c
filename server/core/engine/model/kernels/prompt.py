"""Attention of a prompt's tokens, in bfloat16, block by block of positions.

The softmax goes over the blocks as they come, with the largest score so far; see FlashAttention
(arXiv 2205.14135). Each row passes the blocks from the first position on, so its sums do not
depend on which rows are computed with it.
"""

import numpy as np
from numba import float32, int64, prange, uint16, void

from server.core.engine.model.kernels.compiling import helper, kernel
from server.core.engine.model.kernels.dots import (
    MAX_ROWS,
    TILE,
    add_bfloat16_dots,
    bfloat16_dots,
)
from server.core.engine.model.kernels.floats import exp, largest, to_bfloat16

_ROWS = 4 * MAX_ROWS  # tokens of a query head that pass the blocks together


@helper
def _pack_keys(keys, begin, num, packed):
    """keys: (D, capacity). packed: `num` of them as (D / 2, TILE, 2), and zeros behind."""
    size = len(keys)
    for pair in range(size // 2):
        first = keys[2 * pair][begin : begin + num]
        second = keys[2 * pair + 1][begin : begin + num]
        for s in range(num):
            packed[pair, s, 0], packed[pair, s, 1] = first[s], second[s]
        packed[pair, num:] = 0


@helper
def _pack_values(values, begin, num, packed):
    """values: (D, capacity). packed: `num` of them as (D / TILE, TILE / 2, TILE, 2)."""
    size = len(values)
    if num < TILE:
        packed[:] = 0
    for d in range(size):
        tile, column = d // TILE, d % TILE
        value = values[d][begin : begin + num]
        for s in range(num):
            packed[tile, s // 2, column, s % 2] = value[s]


@helper
def _round(row, rounded):
    for i in range(len(row)):
        rounded[i] = to_bfloat16(row[i])


@helper
def _weigh(score, num_seen, top, weight):
    """Softmax of a row of a block, as far as it can be taken: (TILE,) scores -> bfloat16 weights.

    num_seen: how many positions of the block the row may see. top: its largest score so far.
    Returns the largest score and the sum of the weights, which are relative to it.
    """
    for s in range(max(0, num_seen), TILE):
        score[s] = -np.inf
    top, total = max(largest(score), top), np.float32(0)
    for s in range(TILE):
        share = exp(score[s] - top)
        total += share
        weight[s] = to_bfloat16(share)
    return top, total


@helper
def _attend_rows(queries, keys, values, position, mixed):
    """queries, mixed: (T, D), of tokens from `position` on. keys, values: packed blocks."""
    num, size = queries.shape
    rows = np.empty((num, size), np.uint16)
    sums = np.zeros((num, size), np.float32)
    scores = np.empty((num, TILE), np.float32)
    weights = np.empty((num, TILE), np.uint16)
    tops = np.full(num, np.float32(-np.inf))
    totals = np.zeros(num, np.float32)
    for t in range(num):
        _round(queries[t], rows[t])
    for block in range((position + num - 1) // TILE + 1):
        for t in range(0, num, MAX_ROWS):
            bfloat16_dots(
                min(MAX_ROWS, num - t), rows.ctypes.data + 2 * t * size, 2 * size,
                keys.ctypes.data + block * keys.strides[0], size // 2,
                scores.ctypes.data + 4 * t * TILE, 4 * TILE,
            )  # fmt: skip
        for t in range(num):
            num_seen = position + t + 1 - block * TILE
            top, total = _weigh(scores[t], num_seen, tops[t], weights[t])
            if top != tops[t]:
                factor = exp(tops[t] - top)
                tops[t], totals[t] = top, totals[t] * factor
                sums[t] *= factor
            totals[t] += total
        for tile in range(size // TILE):
            for t in range(0, num, MAX_ROWS):
                add_bfloat16_dots(
                    min(MAX_ROWS, num - t), weights.ctypes.data + 2 * t * TILE, 2 * TILE,
                    values.ctypes.data + block * values.strides[0] + tile * values.strides[1],
                    TILE // 2, sums.ctypes.data + 4 * (t * size + tile * TILE), 4 * size,
                )  # fmt: skip
    for t in range(num):
        mixed[t] = sums[t] / totals[t]


@kernel(
    void(
        float32[:, :, ::1], int64, uint16[:, :, ::1], uint16[:, :, ::1], int64, float32[:, ::1]
    )
)  # fmt: skip
def attend(heads, num_heads, keys, values, begin, mixed):
    """Stores the new keys and values, and mixes the values that each token may see.

    heads: queries, keys and values of T tokens behind `begin` others, (T, H + 2 H_kv, D).
    keys, values: (H_kv, D, capacity). mixed: (T, H D).
    """
    num_tokens, _, size = heads.shape
    num_kv = len(keys)
    group = num_heads // num_kv
    num_blocks = (begin + num_tokens - 1) // TILE + 1
    for item in prange(num_kv):
        for t in range(num_tokens):
            for d in range(size):
                keys[item, d, begin + t] = to_bfloat16(heads[t, num_heads + item, d])
                values[item, d, begin + t] = to_bfloat16(heads[t, num_heads + num_kv + item, d])
    packed_keys = np.empty((num_kv, num_blocks, size // 2, TILE, 2), np.uint16)
    packed_values = np.empty((num_kv, num_blocks, size // TILE, TILE // 2, TILE, 2), np.uint16)
    for item in prange(num_kv * num_blocks):
        kv, block = item // num_blocks, item % num_blocks
        first = block * TILE
        num = min(TILE, begin + num_tokens - first)
        _pack_keys(keys[kv], first, num, packed_keys[kv, block])
        _pack_values(values[kv], first, num, packed_values[kv, block])
    num_parts = -(-num_tokens // _ROWS)
    for item in prange(num_heads * num_parts):
        # The last rows pass the most blocks: they come first, so that threads end together.
        part, head = num_parts - 1 - item // num_heads, item % num_heads
        first = part * _ROWS
        num = min(_ROWS, num_tokens - first)
        _attend_rows(
            heads[first : first + num, head], packed_keys[head // group],
            packed_values[head // group], begin + first,
            mixed[first : first + num, head * size : (head + 1) * size],
        )  # fmt: skip
