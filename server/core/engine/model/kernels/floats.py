"""Arithmetic that numba lacks: bfloat16, and an exponential that works in vectors.

A bfloat16 is held as uint16, the upper half of the float32 of the same value.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from server.core.engine.model.kernels.compiling import helper

_LOG2_E = np.float32(1.44269504)
# The logarithm of 2 in two parts, the first with few bits, so that a multiple of it is exact.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(88.0)


@helper
def exp(x):
    """e^x in float32, to two units in the last place; 0 below -87, and e^88 above 88.

    Source of the polynomial: Cephes, expf.
    """
    bounded = min(max(x, _LOWEST), _HIGHEST)
    n = np.rint(bounded * _LOG2_E)
    r = bounded - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    y = p * r * r + r + np.float32(1)
    y *= np.int32((np.int32(n) + 127) << 23).view(np.float32)
    return np.float32(0) if x < _LOWEST else y


def _generate_multiply_add(typing_context, x, factor, addend):
    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(*[types.float32] * 3), generate


# (x, factor, addend) -> x * factor + addend in float32, always rounded once.
multiply_add: Any = intrinsic(_generate_multiply_add)


@helper
def to_bfloat16(x):
    """Rounds to the nearest, ties to even."""
    bits = np.float32(x).view(np.uint32)
    return np.uint16(np.uint32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


@helper
def from_bfloat16(bits):
    """Converts exactly."""
    return np.uint32(np.uint32(bits) << 16).view(np.float32)


@helper
def ordered(x):
    """An int32 that is larger for a larger float32. A NaN is beyond the infinity of its sign.

    numba compares floats one by one, because of NaN. It compares integers in vectors.
    """
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF))


@helper
def from_ordered(bits):
    """The inverse of `ordered`."""
    return np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(np.float32)


@helper
def largest(row):
    """The largest number of a row, or NaN if the row has a positive NaN.

    row: float32, not empty.
    """
    top = ordered(row[0])
    for i in range(len(row)):
        top = max(top, ordered(row[i]))
    return from_ordered(top)
