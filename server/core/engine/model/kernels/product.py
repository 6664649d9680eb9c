"""Products of 8-bit integers: rows in uint8, a matrix in int8."""

import numpy as np
from numba import float32, int8, int64, prange, uint8, void

from server.core.engine.model.kernels.compiling import helper, kernel
from server.core.engine.model.kernels.dots import MAX_ROWS, TILE, int8_dots
from server.core.engine.model.kernels.rows import store

_COLUMNS = float32[::1]


@helper
def multiply_tile(rows, tile, begin, how, row_scales, row_zeros, scales, sums, bias, y):
    """Multiplies rows with a tile, in parts of nearly equal size.

    rows: (N, C_in). tile: address, in the layout of `dots`. Other arguments: see `store`.
    """
    num_rows, row_bytes = rows.shape
    num_parts = -(-num_rows // MAX_ROWS)
    products = np.empty((MAX_ROWS, TILE), np.int32)
    row = 0
    for part in range(num_parts):
        end = num_rows * (part + 1) // num_parts
        int8_dots(
            end - row, rows.ctypes.data + row * row_bytes, row_bytes, tile, row_bytes // 4,
            products.ctypes.data, 4 * TILE,
        )  # fmt: skip
        store(products[: end - row], row, begin, how, row_scales, row_zeros, scales, sums, bias, y)
        row = end


@kernel(
    void(
        uint8[:, ::1], _COLUMNS, _COLUMNS, int8[::1], _COLUMNS, _COLUMNS, _COLUMNS, float32[:, ::1],
        int64,
    )
)  # fmt: skip
def multiply(rows, row_scales, row_zeros, packed, scales, sums, bias, y, how):
    """rows: (N, C_in). packed: tiles, see `dots`. y: (N, C_out). how and others: see `store`."""
    for tile in prange(-(-y.shape[1] // TILE)):
        begin = tile * TILE
        address = packed.ctypes.data + begin * rows.shape[1]
        multiply_tile(rows, address, begin, how, row_scales, row_zeros, scales, sums, bias, y)
