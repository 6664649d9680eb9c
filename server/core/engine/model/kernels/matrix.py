"""A matrix in 8 bits, multiplied by rows in 8 bits with the processor's dot products."""

import ctypes
import timeit
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.core.engine.heap import trim_heap
from server.core.engine.model.kernels import product, rows
from server.core.engine.model.kernels.dots import TILE
from server.core.engine.model.linear import quantize_rows, smoothed

Floats = NDArray[np.float32]
# Numbers of rows from which on oneDNN's product may be faster than ours.
_MANY_ROWS = (16, 32, 64, 128)


class Quantized(NamedTuple):
    """N rows of 8-bit integers; a number is (integer - zero) * scale."""

    integers: NDArray[np.uint8]  # (N, C)
    scales: Floats  # (N,)
    zeros: Floats  # (N,)


def empty_rows(num_rows: int, num_columns: int) -> Quantized:
    """To be filled by a kernel."""
    scales, zeros = np.empty((2, num_rows), np.float32)
    return Quantized(np.empty((num_rows, num_columns), np.uint8), scales, zeros)


def quantize(x: Floats) -> Quantized:
    """x: (N, C)."""
    quantized = empty_rows(*x.shape)
    rows.quantize(x, *quantized)
    return quantized


class Int8Matrix:
    """A `Linear` with weights in int8 and a scale per row; C_in is a multiple of 64.

    Every row of x is quantized to its own range. With a sample, the columns of x are first made
    alike in size (SmoothQuant, arXiv 2211.10438). oneDNN lays the weights out, and its product and
    ours read the same memory. Sums of integers are exact, so both give the same.
    """

    def __init__(
        self, blocks: Iterable[Tensor], bias: Tensor | None = None, sample: Tensor | None = None,
        *, num_many: int = _MANY_ROWS[0],
    ) -> None:  # fmt: skip
        """num_many: rows from which on oneDNN computes the product."""
        self._num_many = num_many
        blocks, factors = smoothed(blocks, sample)
        quantized = [quantize_rows(block) for block in blocks]
        integers, scales, sums = (torch.cat(parts) for parts in zip(*quantized, strict=True))
        del quantized
        # Returns the memory of the blocks before the matrix is copied once more.
        trim_heap()
        self.num_rows, self.num_columns = integers.shape
        self._packed = torch.ops.onednn.qlinear_prepack(integers, None)
        self._bytes = _bytes_of(self._packed)
        self._ones, self._zeros = torch.ones(self.num_rows), torch.zeros(self.num_rows).long()
        if factors is None:
            factors = torch.ones(self.num_columns)
        self.factors = factors.numpy()
        bias = torch.zeros(self.num_rows) if bias is None else bias.float()
        self._columns = scales.numpy(), sums.numpy(), bias.numpy()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(
            self.product(quantize((x * torch.from_numpy(self.factors)).numpy()))
        )

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        self.add_product(residual.numpy(), quantize((x * torch.from_numpy(self.factors)).numpy()))

    def product(self, x: Quantized) -> Floats:
        """(N, C_in) -> (N, C_out)."""
        y = self.raw_product(x)
        rows.finish(y, x.scales, x.zeros, *self._columns, y, False)
        return y

    def add_product(self, residual: Floats, x: Quantized) -> None:
        """Adds the product to `residual`, (N, C_out)."""
        rows.finish(self.raw_product(x), x.scales, x.zeros, *self._columns, residual, True)

    def gated(self, x: Quantized) -> Quantized:
        """The product without bias is gate and up, (N, 2 I). Returns silu(gate) * up, (N, I)."""
        scales, sums, _ = self._columns
        gated = empty_rows(len(x.integers), self.num_rows // 2)
        rows.gate(self.raw_product(x), x.scales, x.zeros, scales, sums, *gated)
        return gated

    def raw_product(self, x: Quantized) -> Floats:
        """Sums of integers as float32, (N, C_out)."""
        if len(x.integers) < self._num_many:
            raw = np.empty((len(x.integers), self.num_rows), np.float32)
            product.multiply(x.integers, self._bytes, raw)
            return raw
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            torch.from_numpy(x.integers), 1.0, 0, self._packed, self._ones, self._zeros, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return result.numpy()


def measure_num_many() -> int:
    """Rows from which on oneDNN's product is the faster one on this processor. Some 100 ms."""
    for num_rows in _MANY_ROWS:
        x = quantize(np.ones((num_rows, 1024), np.float32))
        ours, theirs = (
            Int8Matrix([torch.ones(4096, 1024)], num_many=n) for n in (num_rows + 1, num_rows)
        )
        if _seconds(theirs, x) < _seconds(ours, x):
            return num_rows
    return 2 * num_rows


def _seconds(matrix: Int8Matrix, x: Quantized) -> float:
    """Of a product, the least of several."""
    return min(timeit.repeat(lambda: matrix.raw_product(x), number=1, repeat=5))


def is_layout_known() -> bool:
    """Whether oneDNN lays matrices out in the tiles that `dots` describes."""
    rows_, columns = 2 * TILE, 4 * TILE
    integers = torch.arange(rows_ * columns).mul(7).remainder(251).sub(125).to(torch.int8)
    integers = integers.view(rows_, columns)
    packed = torch.ops.onednn.qlinear_prepack(integers, None)
    tiles = integers.view(2, TILE, -1, 4).transpose(1, 2).flatten()
    return np.array_equal(_bytes_of(packed)[: tiles.numel()], tiles.numpy())


def _bytes_of(packed: Tensor) -> NDArray[np.int8]:
    """The memory of a matrix that oneDNN has laid out; valid as long as the tensor is."""
    size = torch.ops.mkldnn._nbytes(packed)
    address = torch.ops.mkldnn.data_ptr(packed)
    return np.ctypeslib.as_array((ctypes.c_int8 * size).from_address(address))
