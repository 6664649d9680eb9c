"""Products of 8-bit integers: rows in uint8, a matrix in int8."""

import numpy as np
from numba import float32, int8, prange, uint8, void

from server.core.engine.model.kernels.compiling import helper, kernel
from server.core.engine.model.kernels.dots import MAX_ROWS, TILE, int8_dots


@helper
def multiply_tile(rows, tile, raw, begin):
    """Multiplies rows with a tile, as evenly many at a time as may be.

    rows: (N, C_in). tile: address of one as `dots` has them. raw: (N, C_out), of which the columns
    from `begin` on are filled with the sums.
    """
    num_rows, row_bytes = rows.shape
    width = min(TILE, raw.shape[1] - begin)
    num_parts = -(-num_rows // MAX_ROWS)
    sums = np.empty((MAX_ROWS, TILE), np.int32)
    row = 0
    for part in range(num_parts):
        end = num_rows * (part + 1) // num_parts
        int8_dots(
            end - row, rows.ctypes.data + row * row_bytes, row_bytes, tile, row_bytes // 4,
            sums.ctypes.data, 4 * TILE,
        )  # fmt: skip
        for n in range(row, end):
            for i in range(width):
                raw[n, begin + i] = np.float32(sums[n - row, i])
        row = end


@kernel(void(uint8[:, ::1], int8[::1], float32[:, ::1]))
def multiply(rows, packed, raw):
    """rows: (N, C_in). packed: tiles as `dots` has them. raw: (N, C_out), the sums."""
    for tile in prange(-(-raw.shape[1] // TILE)):
        begin = tile * TILE
        multiply_tile(rows, packed.ctypes.data + begin * rows.shape[1], raw, begin)
