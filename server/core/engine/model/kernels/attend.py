"""Attention over keys and values in bfloat16, block by block of positions.

A block holds TILE positions of one key-value head, in the order in which the processor's dot
products read it: keys as (D / 2, TILE, 2), values as (D / TILE, TILE / 2, TILE, 2), the last index
over two dimensions of a key and over two positions of a value. A slot's blocks are consecutive.
Positions after a sequence's tokens in its last block must be finite: they are multiplied by 0.
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

# Positions whose scores are held at once. A sequence's positions are divided at multiples of it. So
# the sums of a token depend only on its position, not on other sequences, the number of threads or
# whether the token was sampled or belongs to a prompt.
CHUNK = 1024
# Maximum tokens of a work item.
MAX_ITEM_TOKENS = 24
# Maximum rows that read the blocks together, one for each token and query head.
_MAX_ROWS_AT_ONCE = 5 * MAX_ROWS


@helper
def _rows_at_once(num_rows):
    """Rows for each call, so that calls have nearly equal size: each reads the whole block."""
    num_calls = -(-num_rows // MAX_ROWS)
    return -(-num_rows // num_calls)


@helper
def _score(rows, keys, num_blocks):
    """rows: (R, D). keys: address of the first block. Returns (R, num_blocks * TILE)."""
    num_rows, size = rows.shape
    scores = np.empty((num_rows, num_blocks * TILE), np.float32)
    at_once = _rows_at_once(num_rows)
    for block in range(num_blocks):
        for r in range(0, num_rows, at_once):
            bfloat16_dots(
                min(at_once, num_rows - r), rows[r:].ctypes.data, 2 * size,
                keys + 2 * block * TILE * size, size // 2,
                scores[r:, block * TILE :].ctypes.data, scores.strides[0],
            )  # fmt: skip
    return scores


@helper
def _weigh(score, num_seen, weight):
    """Turns the scores of a row into weights in bfloat16, relative to the largest.

    num_seen: positions that the row attends to, at least 1. Returns the largest score and the sum
    of the weights.
    """
    score[num_seen:] = -np.inf
    top, total = largest(score), np.float32(0)
    for s in range(len(score)):
        share = exp(score[s] - top)
        total += share
        weight[s] = to_bfloat16(share)
    return top, total


@helper
def _mix(weights, values, size):
    """Sums weighted values. weights: (R, S). values: address of the first block. Returns (R, D)."""
    num_rows, num_positions = weights.shape
    sums = np.zeros((num_rows, size), np.float32)
    at_once = _rows_at_once(num_rows)
    for block in range(num_positions // TILE):
        for tile in range(size // TILE):
            for r in range(0, num_rows, at_once):
                add_bfloat16_dots(
                    min(at_once, num_rows - r), weights[r:, block * TILE :].ctypes.data,
                    weights.strides[0], values + 2 * TILE * (block * size + tile * TILE), TILE // 2,
                    sums[r:, tile * TILE :].ctypes.data, sums.strides[0],
                )  # fmt: skip
    return sums


@helper
def _attend_chunk(queries, num_seen, keys, values):
    """queries: (T, G, D). num_seen: positions of the chunk that the first token attends to.

    keys, values: addresses of the chunk's first blocks. Returns the largest score of each row, the
    sum of its weights, and the sums of weighted values: (T G,), (T G,), (T G, D).
    """
    num_tokens, group, size = queries.shape
    tops = np.empty(num_tokens * group, np.float32)
    totals = np.empty(num_tokens * group, np.float32)
    rows = np.empty((num_tokens * group, size), np.uint16)
    for r in range(len(rows)):
        query, row = queries[r // group, r % group], rows[r]
        for d in range(size):
            row[d] = to_bfloat16(query[d])
    num_positions = min(CHUNK, num_seen + num_tokens - 1)
    scores = _score(rows, keys, -(-num_positions // TILE))
    weights = np.empty(scores.shape, np.uint16)
    for r in range(len(rows)):
        seen = min(CHUNK, max(1, num_seen + r // group))
        tops[r], totals[r] = _weigh(scores[r], seen, weights[r])
    return tops, totals, _mix(weights, values, size)


@helper
def _merge(tops, totals, parts, out):
    """Merges chunks into one softmax. tops, totals: (chunks,). parts: (chunks, D). out: (D,)."""
    top = tops.max()
    total = np.float32(0)
    out[:] = 0
    for i in range(len(tops)):
        factor = exp(tops[i] - top)
        total += factor * totals[i]
        for d in range(len(out)):
            out[d] += factor * parts[i, d]
    for d in range(len(out)):
        out[d] /= total


@kernel(void(float32[:, :, ::1], int64, uint16[::1], uint16[::1], int64[:, ::1]))
def store(heads, num_heads, keys, values, rows):
    """Stores the keys and values of N tokens in bfloat16.

    heads: queries, keys and values, (N, H + 2 H_kv, D). keys, values: a layer of the arena. rows:
    (N, 3): for each token the first token of its slot in the arena, the slot's capacity, and the
    token's position.
    """
    num_rows, num_all, size = heads.shape
    num_kv = (num_all - num_heads) // 2
    for item in prange(num_rows * num_kv):
        n, kv = item // num_kv, item % num_kv
        begin, capacity, position = rows[n, 0], rows[n, 1], rows[n, 2]
        key, value = heads[n, num_heads + kv], heads[n, num_heads + num_kv + kv]
        place = position % TILE
        block = (begin * num_kv + kv * capacity + position - place) * size
        for d in range(size):
            keys[block + (d // 2 * TILE + place) * 2 + d % 2] = to_bfloat16(key[d])
            tile, column = d // TILE, d % TILE
            pair = (tile * TILE // 2 + place // 2) * TILE + column
            values[block + 2 * pair + place % 2] = to_bfloat16(value[d])


@kernel(
    void(
        float32[:, :, ::1], int64, uint16[::1], uint16[::1], int64[:, ::1], int64[:, ::1],
        float32[:, ::1],
    )
)  # fmt: skip
def attend(heads, num_heads, keys, values, rows, items, mixed):
    """Computes the attention of N tokens, whose keys and values are stored; fills mixed.

    heads, keys, values, rows: see `store`. items: work items, (I, 3): the first token, the number
    of tokens, all of one sequence, and the chunk. mixed: (N, H D).
    """
    num_rows, num_all, size = heads.shape
    num_kv = (num_all - num_heads) // 2
    group = num_heads // num_kv
    num_chunks = items[:, 2].max() + 1
    all_tops = np.empty((num_rows, num_heads, num_chunks), np.float32)
    all_totals = np.empty((num_rows, num_heads, num_chunks), np.float32)
    parts = np.empty((num_rows, num_heads, num_chunks, size), np.float32)
    for item in prange(num_kv * len(items)):
        kv, i = item // len(items), item % len(items)
        n, num, chunk = items[i, 0], items[i, 1], items[i, 2]
        begin, capacity, position = rows[n, 0], rows[n, 1], rows[n, 2]
        offset = 2 * size * (begin * num_kv + kv * capacity + chunk * CHUNK)
        at_once = max(1, _MAX_ROWS_AT_ONCE // group)
        for t in range(n, n + num, at_once):
            end = min(t + at_once, n + num)
            tops, totals, sums = _attend_chunk(
                heads[t:end, kv * group : (kv + 1) * group], position + t - n + 1 - chunk * CHUNK,
                keys.ctypes.data + offset, values.ctypes.data + offset,
            )  # fmt: skip
            for r in range(len(sums)):
                row, head = t + r // group, kv * group + r % group
                all_tops[row, head, chunk], all_totals[row, head, chunk] = tops[r], totals[r]
                parts[row, head, chunk] = sums[r]
    for item in prange(num_rows * num_heads):
        row, head = item // num_heads, item % num_heads
        num = rows[row, 2] // CHUNK + 1
        out = mixed[row, head * size : (head + 1) * size]
        _merge(all_tops[row, head, :num], all_totals[row, head, :num], parts[row, head, :num], out)
