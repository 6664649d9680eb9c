"""Rounds a matrix to 4 bits, and multiplies rows in uint8 with it."""

import numpy as np
from numba import float32, int64, prange, uint8, void

from server.core.engine.model.kernels.compiling import helper, kernel
from server.core.engine.model.kernels.dots import MAX_ROWS, TILE
from server.core.engine.model.kernels.floats import from_ordered, ordered
from server.core.engine.model.kernels.int4_tiles import (
    GROUP,
    GROUP_BYTES,
    direct_dots,
    expand,
)
from server.core.engine.model.kernels.product import multiply_tile
from server.core.engine.model.kernels.rows import store

_TINY = np.float32(1.1754944e-38)
_COLUMNS = float32[::1]
# From this many rows on it is faster to expand a tile to 8-bit integers first.
_MANY_ROWS = 20
# The range of the integers may exclude outliers, down to this share of the range of the weights.
_MIN_RANGE = np.float32(0.75)


@helper
def _error(weights, importance, scale, base):
    """Squared error of a group rounded by scale and base, weighted by the columns' importance."""
    total, inverse = np.float32(0), np.float32(1) / scale
    for i in range(GROUP):
        integer = min(max(np.rint((weights[i] - base) * inverse), np.float32(0)), np.float32(15))
        error = integer * scale + base - weights[i]
        total += importance[i] * error * error
    return total


@helper
def _best_range(weights, importance):
    """Scale and base of a group with the smallest error, integers in float32."""
    lowest = highest = ordered(weights[0])
    for i in range(GROUP):
        place = ordered(weights[i])
        lowest, highest = min(lowest, place), max(highest, place)
    low, high = from_ordered(lowest), from_ordered(highest)
    max_scale = np.ceil((high - low) / 15)
    best_error, best_scale, best_base = np.float32(np.inf), np.float32(1), np.float32(0)
    scale = max(max_scale, np.float32(1))
    while scale >= max(_MIN_RANGE * (high - low) / 15, np.float32(1)):
        for shift in range(-1, 2):
            base = np.rint((high + low) / 2 - scale * (np.float32(7.5) + np.float32(shift) / 3))
            base = min(max(base, np.float32(-128)), 127 - 15 * scale)
            error = _error(weights, importance, scale, base)
            if error < best_error:
                best_error, best_scale, best_base = error, scale, base
        scale -= np.float32(1)
    return best_scale, best_base


@kernel(void(float32[:, ::1], float32[::1], uint8[:, :, ::1], float32[::1], float32[::1]))
def pack(weights, importance, packed, scales, sums):
    """Rounds rows and packs them into tiles.

    weights: (R, C_in), R a multiple of 64. importance: (C_in,). Fills packed, the tiles,
    (R / 64, C_in / 32, GROUP_BYTES); scales, by which a row's integers become weights, (R,); and
    sums, of each row's rounded weights, (R,).
    """
    num_rows, num_columns = weights.shape
    for n in prange(num_rows):
        tile, column = packed[n // TILE], n % TILE
        largest, probe = np.float32(0), np.float32(0)
        for i in range(num_columns):
            largest = max(largest, abs(weights[n, i]))
            probe += np.float32(0) * weights[n, i]
        # NaN if a weight is not finite, so that the model's results are not finite either.
        unit = largest / np.float32(127) + _TINY + probe
        total = np.float32(0)
        group_weights = np.empty(GROUP, np.float32)
        for group in range(num_columns // GROUP):
            begin = group * GROUP
            for i in range(GROUP):
                group_weights[i] = weights[n, begin + i] / unit
            scale, base = _best_range(group_weights, importance[begin : begin + GROUP])
            for i in range(GROUP):
                ratio = np.rint((group_weights[i] - base) / scale)
                integer = min(max(ratio, np.float32(0)), np.float32(15))
                total += integer * scale + base
                place, bits = 4 * TILE * (i % 16 // 4) + 4 * column + i % 4, np.uint8(integer)
                if i < GROUP // 2:
                    tile[group, place] = bits
                else:
                    tile[group, place] |= bits << 4
            tile[group, GROUP * TILE // 2 + column] = np.uint8(scale)
            tile[group, GROUP * TILE // 2 + TILE + column] = np.uint8(np.int32(base) & 0xFF)
        scales[n], sums[n] = unit, total * unit


@helper
def _multiply_directly(
    rows, group_sums, tile, begin, how, row_scales, row_zeros, scales, sums, bias, y
):
    """Multiplies rows with a tile without expanding it. Other arguments: see `multiply_tile`.

    group_sums: of the rows' groups, (N, C_in / 32).
    """
    num_rows, row_bytes = rows.shape
    num_groups = group_sums.shape[1]
    num_parts = -(-num_rows // MAX_ROWS)
    products = np.empty((MAX_ROWS, TILE), np.int32)
    row = 0
    for part in range(num_parts):
        end = num_rows * (part + 1) // num_parts
        direct_dots(
            end - row, rows.ctypes.data + row * row_bytes, row_bytes,
            group_sums.ctypes.data + 4 * row * num_groups, 4 * num_groups, tile, num_groups,
            products.ctypes.data,
        )  # fmt: skip
        store(products[: end - row], row, begin, how, row_scales, row_zeros, scales, sums, bias, y)
        row = end


@kernel(
    void(
        uint8[:, ::1], _COLUMNS, _COLUMNS, uint8[:, :, ::1], _COLUMNS, _COLUMNS, _COLUMNS,
        float32[:, ::1], int64,
    )
)  # fmt: skip
def multiply(rows, row_scales, row_zeros, packed, scales, sums, bias, y, how):
    """rows: (N, C_in). packed: see `pack`. y: (N, C_out). how and other arguments: see `store`."""
    num_rows, num_groups = len(rows), packed.shape[1]
    is_direct = num_rows < _MANY_ROWS
    group_sums = np.zeros((num_rows if is_direct else 0, num_groups), np.int32)
    for n in range(len(group_sums)):
        for i in range(rows.shape[1]):
            group_sums[n, i // GROUP] += rows[n, i]
    for tile in prange(len(packed)):
        address, begin = packed[tile].ctypes.data, tile * TILE
        if is_direct:
            _multiply_directly(
                rows, group_sums, address, begin, how, row_scales, row_zeros, scales, sums, bias, y
            )
        else:
            expanded = np.empty(num_groups * GROUP * TILE, np.int8)
            expand(address, num_groups, expanded.ctypes.data)
            multiply_tile(
                rows, expanded.ctypes.data, begin, how, row_scales, row_zeros, scales, sums, bias, y
            )


def empty_tiles(num_rows: int, num_columns: int) -> np.ndarray:
    """Memory for the tiles that `pack` fills."""
    return np.empty((num_rows // TILE, num_columns // GROUP, GROUP_BYTES), np.uint8)
