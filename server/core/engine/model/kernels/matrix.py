"""Matrices in 8 and 4 bits, multiplied by rows in 8 bits with the processor's dot products."""

import ctypes
import timeit
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.core.engine.heap import trim_heap, use_huge_pages
from server.core.engine.model.kernels import int4, product, rows
from server.core.engine.model.kernels.dots import TILE
from server.core.engine.model.linear import in_rows_of, padded, quantize_rows, smoothed

Floats = NDArray[np.float32]
# Candidates for the number of rows from which on oneDNN's product is faster than ours.
_MANY_ROWS = (16, 32, 64, 128)
# oneDNN keeps a program of nearly 1 MB for each number of rows and each matrix's shape, so it gets
# multiples of this many rows.
_ROWS_OF_SHAPE = 32
# Rows that are rounded at once; this bounds the size of the copies in float32.
_ROWS_AT_ONCE = 512


class Quantized(NamedTuple):
    """N rows of 8-bit integers; a number is (integer - zero) * scale."""

    integers: NDArray[np.uint8]  # (N, C)
    scales: Floats  # (N,)
    zeros: Floats  # (N,)

    def of(self, rows: NDArray[np.int64] | slice) -> "Quantized":
        """Some of the rows."""
        return Quantized(self.integers[rows], self.scales[rows], self.zeros[rows])

    def replace(self, rows: NDArray[np.int64] | slice, other: "Quantized") -> None:
        """Overwrites some of the rows with the other ones."""
        self.integers[rows] = other.integers
        self.scales[rows], self.zeros[rows] = other.scales, other.zeros


def empty_rows(num_rows: int, num_columns: int) -> Quantized:
    """Memory for a kernel to fill."""
    scales, zeros = np.empty((2, num_rows), np.float32)
    return Quantized(np.empty((num_rows, num_columns), np.uint8), scales, zeros)


def quantize(x: Floats) -> Quantized:
    """Quantizes the rows of x, (N, C)."""
    quantized = empty_rows(*x.shape)
    rows.quantize(x, *quantized)
    return quantized


class Columns(NamedTuple):
    """Numbers that turn sums of integers into values, for each of a product's C_out columns."""

    scales: Floats
    sums: Floats  # of the weights that a column is multiplied with
    bias: Floats


class Packed(Protocol):
    """A matrix of integers, (C_out, C_in), as the processor's instructions read it."""

    def multiply(
        self, x: Quantized, columns: Columns, how: int, residual: Floats | None = None
    ) -> Floats:
        """(N, C_in) -> (N, C_out). how: `rows.RAW`, `rows.VALUE`, or `rows.ADDED` to residual."""


class PackedRows(NamedTuple):
    """A matrix: its integers, the scale of each row, and the sums of the dequantized rows."""

    packed: Packed
    scales: Tensor
    sums: Tensor


# Packs blocks of rows; the second argument is the importance of each column, (C_in,).
Pack = Callable[[Iterable[Tensor], Tensor | None], PackedRows]


class KernelMatrix:
    """A `Linear` of packed integers; C_in is a multiple of 64.

    Every row of x is quantized to its own range. With a sample, the columns of x are first scaled
    to similar sizes (SmoothQuant, arXiv 2211.10438).
    """

    def __init__(
        self, blocks: Iterable[Tensor], bias: Tensor | None = None, sample: Tensor | None = None,
        *, pack: Pack,
    ) -> None:  # fmt: skip
        blocks, factors = smoothed(blocks, sample)
        importance = None
        if sample is not None and factors is not None:
            importance = (sample * factors).square().mean(0)
        self._packed, scales, sums = pack(blocks, importance)
        # Returns the memory of the blocks.
        trim_heap()
        self.num_rows = len(scales)
        # Of the columns of x, (C_in,); None: all 1.
        self.factors = None if factors is None else factors.numpy()
        bias = torch.zeros(self.num_rows) if bias is None else bias.float()
        self._columns = Columns(scales.numpy(), sums.numpy(), bias.numpy())

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.product(self._quantized(x)))

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        self.add_product(residual.numpy(), self._quantized(x))

    def product(self, x: Quantized) -> Floats:
        """(N, C_in) -> (N, C_out)."""
        return self._packed.multiply(x, self._columns, rows.VALUE)

    def add_product(self, residual: Floats, x: Quantized) -> None:
        """Adds the product to `residual`, (N, C_out)."""
        self._packed.multiply(x, self._columns, rows.ADDED, residual)

    def sums(self, x: Quantized) -> Floats:
        """The product's sums of integers, (N, C_out)."""
        return self._packed.multiply(x, self._columns, rows.RAW)

    def values(self, sums: Floats, x: Quantized) -> Floats:
        """The product from its sums, which it overwrites."""
        rows.finish(sums, x.scales, x.zeros, *self._columns, sums, rows.VALUE)
        return sums

    def gated(self, sums: Floats, x: Quantized) -> Quantized:
        """silu(gate) * up, (N, I). sums: of gate and up, (N, 2 I), which have no bias."""
        gated = empty_rows(len(sums), self.num_rows // 2)
        rows.gate(sums, x.scales, x.zeros, self._columns.scales, self._columns.sums, *gated)
        return gated

    def _quantized(self, x: Tensor) -> Quantized:
        return quantize(x.numpy() if self.factors is None else x.numpy() * self.factors)


class _Int8:
    """Tiles in oneDNN's layout; oneDNN multiplies them if there are many rows."""

    def __init__(self, integers: Tensor, num_many: int) -> None:
        """num_many: rows from which on oneDNN computes the product."""
        self._num_rows, self._num_many = len(integers), num_many
        self._packed = torch.ops.onednn.qlinear_prepack(integers, None)
        self._bytes = _bytes_of(self._packed)
        use_huge_pages(self._bytes.ctypes.data, self._bytes.nbytes)
        self._ones, self._zeros = torch.ones(self._num_rows), torch.zeros(self._num_rows).long()

    def multiply(
        self, x: Quantized, columns: Columns, how: int, residual: Floats | None = None
    ) -> Floats:
        """Sums of integers are exact: ours and oneDNN's are the same."""
        if len(x.integers) < self._num_many:
            y = _empty_product(x, columns) if residual is None else residual
            product.multiply(*x, self._bytes, *columns, y, how)
            return y
        raw = self._multiply_by_onednn(x.integers).numpy()
        y = raw if residual is None else residual
        if how != rows.RAW:
            rows.finish(raw, x.scales, x.zeros, *columns, y, how)
        return y

    def _multiply_by_onednn(self, x: NDArray[np.uint8]) -> Tensor:
        """(N, C_in) -> (N, C_out): the sums."""
        padded_x = np.empty((-(-len(x) // _ROWS_OF_SHAPE) * _ROWS_OF_SHAPE, x.shape[1]), np.uint8)
        padded_x[: len(x)] = x
        raw: Tensor = torch.ops.onednn.qlinear_pointwise(
            torch.from_numpy(padded_x), 1.0, 0, self._packed, self._ones, self._zeros, None, 1.0, 0,
            torch.float32, "none", [], "",
        )  # fmt: skip
        return raw[: len(x)]


class _Int4:
    """Tiles of 4-bit integers."""

    def __init__(self, tiles: NDArray[np.uint8]) -> None:
        self._tiles = tiles
        use_huge_pages(tiles.ctypes.data, tiles.nbytes)

    def multiply(
        self, x: Quantized, columns: Columns, how: int, residual: Floats | None = None
    ) -> Floats:
        y = _empty_product(x, columns) if residual is None else residual
        int4.multiply(*x, self._tiles, *columns, y, how)
        return y


def _empty_product(x: Quantized, columns: Columns) -> Floats:
    return np.empty((len(x.integers), len(columns.scales)), np.float32)


def int8_packer(num_many: int) -> Pack:
    """Rounds to 8 bits, the largest weight of each row to 127. num_many: see `_Int8`."""

    def pack(blocks: Iterable[Tensor], importance: Tensor | None) -> PackedRows:
        quantized = []
        for block in blocks:
            quantized += [quantize_rows(part) for part in block.split(_ROWS_AT_ONCE)]
            # The results fill gaps in the heap, so that the next block fits into none: without
            # this a matrix may take its whole size in float32.
            del block
            trim_heap()
        integers, scales, sums = (torch.cat(parts) for parts in zip(*quantized, strict=True))
        return PackedRows(_Int8(integers, num_many), scales, sums)

    return pack


def pack_int4(blocks: Iterable[Tensor], importance: Tensor | None) -> PackedRows:
    """Rounds to 4 bits, with ranges of groups that make the weighted error small."""
    parts, num_rows = [], 0
    for block in in_rows_of(blocks, TILE):
        num_rows += len(block)
        weights = padded(block.float(), TILE).contiguous()
        column_importance = torch.ones(weights.shape[1]) if importance is None else importance
        tiles = int4.empty_tiles(*weights.shape)
        scales, sums = np.empty((2, len(weights)), np.float32)
        int4.pack(weights.numpy(), column_importance.numpy(), tiles, scales, sums)
        parts.append((tiles, scales, sums))
        del block, weights
        trim_heap()
    tiles, scales, sums = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    scales_and_sums = (torch.from_numpy(array[:num_rows]) for array in (scales, sums))
    return PackedRows(_Int4(tiles), *scales_and_sums)


def measure_num_many() -> int:
    """Rows from which on oneDNN's product is faster on this processor; takes some 100 ms."""
    integers = torch.ones(4096, 1024, dtype=torch.int8)
    for num_rows in _MANY_ROWS:
        ours, theirs = _Int8(integers, num_rows + 1), _Int8(integers, num_rows)
        if _seconds(theirs, num_rows) < _seconds(ours, num_rows):
            return num_rows
    return 2 * num_rows


def _seconds(matrix: Packed, num_rows: int) -> float:
    """Of a product with a (4096, 1024) matrix, the least of several."""
    x, columns = (
        quantize(np.ones((num_rows, 1024), np.float32)),
        Columns(*np.ones((3, 4096), np.float32)),
    )
    multiply = partial(matrix.multiply, x, columns, rows.VALUE)
    return min(timeit.repeat(multiply, number=1, repeat=5))


def is_layout_known() -> bool:
    """Whether oneDNN stores matrices in the tiles that `dots` describes."""
    integers = torch.arange(2 * TILE * 4 * TILE).mul(7).remainder(251).sub(125).to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(integers.view(2 * TILE, 4 * TILE), None)
    tiles = integers.view(2, TILE, -1, 4).transpose(1, 2).flatten()
    return np.array_equal(_bytes_of(packed)[: tiles.numel()], tiles.numpy())


def _bytes_of(packed: Tensor) -> NDArray[np.int8]:
    """The memory of a matrix that oneDNN has packed; valid as long as the tensor lives."""
    size = torch.ops.mkldnn._nbytes(packed)
    address = torch.ops.mkldnn.data_ptr(packed)
    return np.ctypeslib.as_array((ctypes.c_int8 * size).from_address(address))
