"""Attention of sampled tokens, one of each sequence, over keys and values in bfloat16."""

import numpy as np
from numba import float32, int64, prange, uint16, void

from server.core.engine.model.kernels.compiling import helper, kernel
from server.core.engine.model.kernels.floats import exp, from_bfloat16, largest, to_bfloat16

# Positions whose scores are held at once. A sequence's positions are divided at its multiples, so
# its sums do not depend on other sequences, nor on the number of threads.
_CHUNK = 1024
# Dimensions of the keys that are added to the scores at once.
_FEW = 4


@helper
def _score(queries, keys, begin, num):
    """queries: (G, D). keys: (D, capacity). Returns the products, (G, num)."""
    group, size = queries.shape
    scores = np.zeros((group, num), np.float32)
    few = np.empty((_FEW, num), np.float32)
    for first in range(0, size, _FEW):
        for i in range(_FEW):
            bits, key = keys[first + i][begin : begin + num], few[i]
            for s in range(num):
                key[s] = from_bfloat16(bits[s])
        k0, k1, k2, k3 = few[0], few[1], few[2], few[3]
        for g in range(group):
            q0, q1 = queries[g, first], queries[g, first + 1]
            q2, q3 = queries[g, first + 2], queries[g, first + 3]
            row = scores[g]
            for s in range(num):
                row[s] += q0 * k0[s] + q1 * k1[s] + q2 * k2[s] + q3 * k3[s]
    return scores


@helper
def _attend_chunk(queries, keys, values, begin, num, tops, totals, parts):
    """Attends to `num` positions from `begin` on.

    queries: (G, D). keys, values: (D, capacity). Fills the others: (G,), (G,), (G, D).
    """
    weights = _score(queries, keys, begin, num)
    for g in range(len(queries)):
        row = weights[g]
        tops[g], total = largest(row), np.float32(0)
        for s in range(num):
            row[s] = exp(row[s] - tops[g])
            total += row[s]
        totals[g] = total
    value = np.empty(num, np.float32)
    for d in range(len(values)):
        bits = values[d][begin : begin + num]
        for s in range(num):
            value[s] = from_bfloat16(bits[s])
        for g in range(len(queries)):
            row, total = weights[g], np.float32(0)
            for s in range(num):
                total += row[s] * value[s]
            parts[g, d] = total


@helper
def _merge(tops, totals, parts, out):
    """One softmax over chunks. tops, totals: (chunks,). parts: (chunks, D). out: (D,)."""
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


@kernel(
    void(
        float32[:, :, ::1], int64, uint16[::1], uint16[::1], int64[::1], int64[::1], int64[::1],
        float32[:, ::1],
    )
)  # fmt: skip
def attend(heads, num_heads, keys, values, begins, capacities, lengths, mixed):
    """Stores the new keys and values, and mixes the values of all positions.

    heads: queries, keys and values of B tokens, (B, H + 2 H_kv, D). keys, values: a layer of the
    arena. begins, capacities, lengths: of each sequence's slot, (B,). mixed: (B, H D).
    """
    num_rows, num_all, size = heads.shape
    num_kv = (num_all - num_heads) // 2
    group = num_heads // num_kv
    num_chunks = lengths.max() // _CHUNK + 1
    tops = np.empty((num_rows, num_kv, num_chunks, group), np.float32)
    totals = np.empty((num_rows, num_kv, num_chunks, group), np.float32)
    parts = np.empty((num_rows, num_kv, num_chunks, group, size), np.float32)
    for item in prange(num_rows * num_kv * num_chunks):
        n, rest = item // (num_kv * num_chunks), item % (num_kv * num_chunks)
        kv, chunk = rest // num_chunks, rest % num_chunks
        length, first = lengths[n], chunk * _CHUNK
        if first <= length:
            slot = slice(
                begins[n] + kv * capacities[n] * size, begins[n] + (kv + 1) * capacities[n] * size
            )
            slot_keys = keys[slot].reshape(size, capacities[n])
            slot_values = values[slot].reshape(size, capacities[n])
            num = min(_CHUNK, length + 1 - first)
            if first + num == length + 1:
                for d in range(size):
                    slot_keys[d, length] = to_bfloat16(heads[n, num_heads + kv, d])
                    slot_values[d, length] = to_bfloat16(heads[n, num_heads + num_kv + kv, d])
            _attend_chunk(
                heads[n, kv * group : (kv + 1) * group], slot_keys, slot_values, first, num,
                tops[n, kv, chunk], totals[n, kv, chunk], parts[n, kv, chunk],
            )  # fmt: skip
    for item in prange(num_rows * num_kv):
        n, kv = item // num_kv, item % num_kv
        num = lengths[n] // _CHUNK + 1
        for g in range(group):
            out = mixed[n, (kv * group + g) * size : (kv * group + g + 1) * size]
            _merge(tops[n, kv, :num, g], totals[n, kv, :num, g], parts[n, kv, :num, g], out)
