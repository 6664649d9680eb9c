"""Products of 8-bit integers: rows in uint8, a matrix in int8."""

import numpy as np
from numba import float32, int8, prange, uint8, void

from server.core.engine.model.kernels.compiling import kernel
from server.core.engine.model.kernels.dots import MAX_ROWS, TILE, int8_dots


@kernel(void(uint8[:, ::1], int8[::1], float32[:, ::1]))
def multiply(rows, packed, raw):
    """rows: (N, C_in). packed: tiles as `dots` has them. raw: (N, C_out), the sums.

    Each tile is read once from memory and multiplied with all rows, as evenly many at a time as
    may be.
    """
    num_rows, num_columns = raw.shape
    row_bytes = rows.shape[1]
    num_parts = -(-num_rows // MAX_ROWS)
    for tile in prange(-(-num_columns // TILE)):
        sums = np.empty((MAX_ROWS, TILE), np.int32)
        begin = tile * TILE
        width = min(TILE, num_columns - begin)
        row = 0
        for part in range(num_parts):
            end = num_rows * (part + 1) // num_parts
            int8_dots(
                end - row, rows.ctypes.data + row * row_bytes, row_bytes,
                packed.ctypes.data + begin * row_bytes, row_bytes // 4,
                sums.ctypes.data, 4 * TILE,
            )  # fmt: skip
            for n in range(row, end):
                for i in range(width):
                    raw[n, begin + i] = np.float32(sums[n - row, i])
            row = end
