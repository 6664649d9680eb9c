"""Linear layers by type of weight: float32, bfloat16, int8, int4.

Each takes and returns float32, so a model does not know which type it holds. Weights are quantized
while a checkpoint is read, block by block: the whole matrix never exists in float32.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from server.core.engine.heap import trim_heap

QUANTIZED_DTYPES = ("int8", "int4")
INT4_GROUP_SIZE = 64
# Unless there is a multiple of this many rows, matrix products sum the last ones in another order.
ROWS = 4
# Rows in a block of a packed int4 matrix.
_INT4_BLOCK = 64
_TINY = torch.finfo(torch.float32).tiny
# Lower bound of a column's size, as a share of the largest column's.
_SMALLEST_COLUMN = 1e-3


class Linear(Protocol):
    """x W^T + bias, where W is (C_out, C_in)."""

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C_in) -> (N, C_out), both float32. The caller may change the result."""

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """Adds the result to `residual`, (N, C_out)."""


class LinearFactory(Protocol):
    """Makes a layer from the rows of its matrix, which come in blocks from top to bottom.

    sample: typical inputs of the layer, (N, C_in). Types that quantize may learn from them which
    columns hold large numbers.
    """

    def __call__(
        self, blocks: Iterable[Tensor], bias: Tensor | None = None, sample: Tensor | None = None
    ) -> Linear: ...


class Factories(NamedTuple):
    """Makes the matrices of a model, by their place in it."""

    attention: LinearFactory
    mlp: LinearFactory
    head: LinearFactory


class FloatLinear:
    """Weights in float32 or bfloat16, multiplied as they are."""

    def __init__(
        self, blocks: Iterable[Tensor], bias: Tensor | None = None, *, dtype: torch.dtype
    ) -> None:
        self.weight = torch.cat([block.to(dtype) for block in blocks])
        self._bias = bias if bias is None else bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self._bias).float()

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        residual.add_(self(x))


class Int8Linear:
    """Weights in int8 with a scale per row, multiplied by activations in 8 bits (dynamic).

    Every row of x is quantized to its own range, from its smallest to its largest number, so
    its result does not depend on the other rows of a batch. With a sample, the columns of x are
    first scaled to similar sizes (SmoothQuant, arXiv 2211.10438): a few columns of a norm's output
    are twenty times as large as the rest, which would keep three or four bits. FBGEMM's kernel
    is bound by the memory's speed up to 8 rows, and by arithmetic above.
    """

    def __init__(
        self, blocks: Iterable[Tensor], bias: Tensor | None = None, sample: Tensor | None = None
    ) -> None:
        blocks, self._factors = smoothed(blocks, sample)
        quantized = [quantize_rows(block) for block in blocks]
        integers, scales, row_sums = (torch.cat(parts) for parts in zip(*quantized, strict=True))
        del quantized
        # Returns the memory of the blocks before the matrix is copied twice more.
        trim_heap()
        zero_points = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():
            # Deprecated in PyTorch 2.13, but no replacement runs this kernel.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
            weight = torch._make_per_channel_quantized_tensor(
                integers, scales.double(), zero_points, 0
            )
        del integers
        self._packed = torch.ops.quantized.linear_prepack(weight, None)
        self._row_sums = row_sums
        self._bias = bias
        # Without VNNI pairs of products are added in 16 bits, which overflow on 8-bit activations.
        self._has_vnni = torch.cpu._is_vnni_supported()

    def __call__(self, x: Tensor) -> Tensor:
        y = self._multiply(x)
        return y if self._bias is None else y.add_(self._bias)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        residual.add_(self._multiply(x))
        if self._bias is not None:
            residual.add_(self._bias)

    def _multiply(self, x: Tensor) -> Tensor:
        # A single row takes the same operations as a batch, so its result is bit-identical.
        # `linear_dynamic` would save a single row five small calls, 3 ms a token, but it rounds in
        # another order. Within 48 tokens that changed three texts of four.
        if self._factors is not None:
            x = x * self._factors
        # amin and amax are seven times faster on many rows than aminmax.
        low = x.amin(-1, keepdim=True).clamp_max_(0)
        high = x.amax(-1, keepdim=True).clamp_min_(0)
        scales = (high - low).div_(255 if self._has_vnni else 127).clamp_min_(_TINY)
        zero_points = (low / scales).round_().neg_()
        # addcdiv, which would do this in one call, takes six times as long on many rows.
        quantized = (x * scales.reciprocal()).add_(zero_points)
        y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            quantized, 1.0, 0, self._packed
        )
        return y.addcmul_(zero_points, self._row_sums, value=-1).mul_(scales)

    @staticmethod
    def is_supported() -> bool:
        """Whether this machine has the kernel (x86 processors do)."""
        return "fbgemm" in torch.backends.quantized.supported_engines


class Int4Linear:
    """Weights in 4 bits, a scale and a zero per row and group of columns (weight-only).

    With a sample, columns are scaled as in int8, so that weights are rounded less where they are
    multiplied by large numbers.
    """

    def __init__(
        self, blocks: Iterable[Tensor], bias: Tensor | None = None, sample: Tensor | None = None
    ) -> None:
        packed, scales_and_zeros, num_rows = [], [], 0
        blocks, self._factors = smoothed(blocks, sample)
        for block in in_rows_of(blocks, _INT4_BLOCK):
            num_rows += len(block)
            integers, scales, zeros = _quantize_groups(padded(block, _INT4_BLOCK))
            packed.append(torch._convert_weight_to_int4pack_for_cpu(integers, 1))
            scales_and_zeros.append(torch.stack((scales, zeros), dim=-1))
        del blocks, block, integers, scales, zeros
        trim_heap()
        self._packed = torch.cat(packed)
        scales = torch.cat(scales_and_zeros).transpose(0, 1).contiguous()
        self._scales_and_zeros = scales.to(torch.bfloat16)
        self._num_rows = num_rows
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if self._factors is not None:
            x = x * self._factors
        # In float32 the kernel has no fast path.
        y = torch._weight_int4pack_mm_for_cpu(
            x.to(torch.bfloat16), self._packed, INT4_GROUP_SIZE, self._scales_and_zeros
        )[:, : self._num_rows].float()
        return y if self._bias is None else y.add_(self._bias)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        residual.add_(self(x))


def linear_factory(dtype: str) -> LinearFactory:
    """The layer type for "float32", "bfloat16", "int8" or "int4"."""
    makers: dict[str, Callable[..., Linear]] = {"int8": Int8Linear, "int4": Int4Linear}
    if dtype in makers:
        return makers[dtype]
    return lambda blocks, bias=None, sample=None: FloatLinear(
        blocks, bias, dtype=getattr(torch, dtype)
    )


def smoothed(
    blocks: Iterable[Tensor], sample: Tensor | None
) -> tuple[Iterator[Tensor], Tensor | None]:
    """The blocks with their columns divided by factors, and the factors (C_in,).

    Without a sample: the blocks as they are, and None.
    """
    blocks = iter(blocks)
    if sample is None:
        return blocks, None
    first = next(blocks)
    factors = _smoothing_factors(sample, first)
    return (block / factors for block in chain((first,), blocks)), factors


def _smoothing_factors(sample: Tensor, rows: Tensor) -> Tensor:
    """Factors for the columns of x, by which those of the weights are divided: (C_in,).

    A column is then equally large in x and in the weights. Factors are powers of two, so that
    nothing is rounded. rows: of the weights; the first block of them is enough.
    """
    sizes, weight_sizes = _column_sizes(sample), _column_sizes(rows)
    exponents: Tensor = (weight_sizes / sizes).log2().div_(2).round_()
    return exponents.exp2_()


def _column_sizes(rows: Tensor) -> Tensor:
    """Norms of the columns over their mean, bounded from below: (C_in,)."""
    sizes: Tensor = torch.linalg.vector_norm(rows.float(), dim=0)
    sizes = sizes.clamp_min_(max(_SMALLEST_COLUMN * sizes.max().item(), _TINY))
    return sizes / sizes.mean()


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes rows to symmetric int8, the largest number of each to 127.

    Returns integers (R, C_in), scales (R,), and the sums of the dequantized rows (R,).
    """
    weight = weight.float()
    scales = weight.abs().amax(1).clamp_min(_TINY) / 127
    integers = (weight / scales[:, None]).round_()
    return integers.to(torch.int8), scales, integers.sum(1) * scales


def _quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes groups of columns to asymmetric 4 bits.

    A weight is (integer - 8) * scale + zero, as torch._weight_int4pack_mm_for_cpu reads it.
    Returns integers (R, C_in) from 0 to 15 in int32, scales and zeros (R, C_in / G).
    """
    groups = weight.float().view(len(weight), -1, INT4_GROUP_SIZE)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).clamp_min(_TINY)
    integers = ((groups - low[..., None]) / scales[..., None]).round_().clamp_(0, 15)
    return integers.flatten(1).to(torch.int32), scales, low + 8 * scales


def in_rows_of(blocks: Iterable[Tensor], size: int) -> Iterable[Tensor]:
    """The same rows in other blocks: each but the last has a multiple of `size` rows."""
    rest: Tensor | None = None
    for block in blocks:
        rows = block if rest is None else torch.cat((rest, block))
        whole = len(rows) // size * size
        if whole:
            yield rows[:whole]
        rest = rows[whole:] if whole < len(rows) else None
    if rest is not None:
        yield rest


def padded(rows: Tensor, size: int) -> Tensor:
    """Appends rows of zeros, up to a multiple of `size`."""
    return F.pad(rows, (0, 0, 0, -len(rows) % size))
