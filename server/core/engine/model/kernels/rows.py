"""Operations on the rows of a step between two products, each in one pass.

A raw product of 8-bit integers is its sums of integers as float32, (N, C_out). Its value is
((raw * column scale) - zero * column sum) * row scale + bias. Rows do not depend on each other, so
a row's result is the same in any batch.
"""

import numpy as np
from numba import float32, int64, prange, uint8, void

from server.core.engine.model.kernels.compiling import helper, kernel
from server.core.engine.model.kernels.floats import exp, from_ordered, multiply_add, ordered

_TINY = np.float32(1.1754944e-38)
# What to store of a product: sums of integers, values, or values added to the target.
RAW, VALUE, ADDED = 0, 1, 2
_ROWS, _COLUMNS = float32[:, ::1], float32[::1]


@helper
def _quantize(row, factor, quantized):
    """Quantizes factor * row to its own range, from its smallest to its largest number.

    Returns scale and zero: a number is (integer - zero) * scale. The scale is NaN if a number is.
    """
    lowest = highest = np.int32(0)
    for i in range(len(row)):
        place = ordered(row[i])
        lowest, highest = min(lowest, place), max(highest, place)
    low, high = from_ordered(lowest), from_ordered(highest)
    scale = (high - low) / np.float32(255) + _TINY
    zero = np.rint(-low / scale)
    inverse = np.float32(1) / scale
    for i in range(len(row)):
        quantized[i] = np.uint8(np.int32(np.rint(row[i] * inverse) + zero))
    return scale * factor, zero


# Values are computed in two places, from a tile's sums and from oneDNN's. `multiply_add` keeps the
# compiler from fusing additions and products differently, and so rounding differently, in each.
@helper
def _value(raw, row_scale, row_zero, column_scale, column_sum, bias):
    centred = multiply_add(raw, column_scale, -(row_zero * column_sum))
    return multiply_add(centred, row_scale, bias)


@kernel(void(_ROWS, uint8[:, ::1], _COLUMNS, _COLUMNS))
def quantize(x, quantized, scales, zeros):
    """Quantizes the rows of x, (N, C). Fills quantized (N, C), scales (N,) and zeros (N,)."""
    for n in prange(len(x)):
        scales[n], zeros[n] = _quantize(x[n], np.float32(1), quantized[n])


@kernel(void(_ROWS, _COLUMNS, float32, uint8[:, ::1], _COLUMNS, _COLUMNS))
def normalise(hidden, factors, epsilon, quantized, scales, zeros):
    """Quantizes factors * x / sqrt(sum of squares + epsilon) for each row x of hidden, (N, C).

    factors: (C,). RMSNorm's sqrt(C) is in the weights of the next product.
    """
    for n in prange(len(hidden)):
        row = np.empty(hidden.shape[1], np.float32)
        total = np.float32(0)
        for i in range(len(row)):
            total += hidden[n, i] * hidden[n, i]
            row[i] = hidden[n, i] * factors[i]
        factor = np.float32(1) / np.sqrt(total + epsilon)
        scales[n], zeros[n] = _quantize(row, factor, quantized[n])


@kernel(void(_ROWS, _COLUMNS, _COLUMNS, _COLUMNS, _COLUMNS, uint8[:, ::1], _COLUMNS, _COLUMNS))
def gate(raw, row_scales, row_zeros, column_scales, column_sums, quantized, scales, zeros):
    """Quantizes silu(gate) * up; raw: the product with both matrices, (N, 2 I)."""
    size = raw.shape[1] // 2
    for n in prange(len(raw)):
        row = np.empty(size, np.float32)
        scale, zero = row_scales[n], row_zeros[n]
        for i in range(size):
            j, none = size + i, np.float32(0)
            x = _value(raw[n, i], scale, zero, column_scales[i], column_sums[i], none)
            up = _value(raw[n, j], scale, zero, column_scales[j], column_sums[j], none)
            row[i] = x / (np.float32(1) + exp(-x)) * up
        scales[n], zeros[n] = _quantize(row, np.float32(1), quantized[n])


@helper
def store(sums, first_row, begin, how, row_scales, row_zeros, column_scales, column_sums, bias, y):
    """Stores the sums of a tile, (N, 64) in int32, in y, (rows, C_out).

    The tile begins at row `first_row` and column `begin`. how: `RAW`, `VALUE` or `ADDED`.
    """
    width = min(sums.shape[1], y.shape[1] - begin)
    scales, weight_sums = column_scales[begin : begin + width], column_sums[begin : begin + width]
    biases = bias[begin : begin + width]
    for n in range(len(sums)):
        row_sums, row = sums[n], y[first_row + n][begin : begin + width]
        scale, zero = row_scales[first_row + n], row_zeros[first_row + n]
        if how == RAW:
            for i in range(width):
                row[i] = np.float32(row_sums[i])
        elif how == VALUE:
            for i in range(width):
                raw = np.float32(row_sums[i])
                row[i] = _value(raw, scale, zero, scales[i], weight_sums[i], biases[i])
        else:
            for i in range(width):
                raw = np.float32(row_sums[i])
                row[i] += _value(raw, scale, zero, scales[i], weight_sums[i], biases[i])


@kernel(void(_ROWS, _COLUMNS, _COLUMNS, _COLUMNS, _COLUMNS, _COLUMNS, _ROWS, int64))
def finish(raw, row_scales, row_zeros, column_scales, column_sums, bias, y, how):
    """Stores the values of a raw product, (N, C_out), in y, which may be raw.

    how: `VALUE` or `ADDED`.
    """
    for n in prange(len(raw)):
        scale, zero = row_scales[n], row_zeros[n]
        for i in range(raw.shape[1]):
            value = _value(raw[n, i], scale, zero, column_scales[i], column_sums[i], bias[i])
            y[n, i] = y[n, i] + value if how == ADDED else value


@kernel(void(float32[:, :, ::1], _ROWS, _ROWS, float32))
def rotate(heads, rotations, norms, epsilon):
    """Applies RoPE to the queries and keys of each token in place. heads: (N, H + 2 H_kv, D).

    rotations: (N, D), cosine and sine of each pair. norms: (H + H_kv, D), by which x / sqrt(sum of
    squares + epsilon) is multiplied first; (H + H_kv, 0) if there is no norm.
    """
    size = heads.shape[2]
    for n in prange(len(heads)):
        for h in range(len(norms)):
            head = heads[n, h]
            if norms.shape[1]:
                total = np.float32(0)
                for i in range(size):
                    total += head[i] * head[i]
                factor = np.float32(1) / np.sqrt(total + epsilon)
                for i in range(size):
                    head[i] *= factor * norms[h, i]
            for i in range(0, size, 2):
                cosine, sine = rotations[n, i], rotations[n, i + 1]
                x, y = head[i], head[i + 1]
                head[i] = x * cosine - y * sine
                head[i + 1] = x * sine + y * cosine
