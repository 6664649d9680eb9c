"""Weights in safetensors that GPTQ or AWQ has packed into few bits.

Sources of the formats: AutoGPTQ's `QuantLinear.pack` and AutoAWQ's `WQLinear_GEMM.from_linear`.
Both hold a transposed matrix, (C_in, C_out), with eight 4-bit integers in a 32-bit word: GPTQ eight
rows of a column, AWQ eight columns of a row. The zeros have one row for each group and, in both,
eight columns in a word.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from server.core.engine.checkpoint import CheckpointError
from server.core.engine.model.weights.packing import Packing
from server.core.engine.model.weights.safetensors_folder import DTYPES, SafetensorsReader

_WORD_BITS = 32
# The place of each of eight columns in AWQ's words, in units of four bits.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class PackedReader(SafetensorsReader):
    """The tensors of a checkpoint folder in which some matrices are packed."""

    def __init__(self, folder: Path, packing: Packing) -> None:
        super().__init__(folder)
        self._packing = packing
        per_word = _WORD_BITS // packing.bits
        self._shifts = torch.arange(per_word, dtype=torch.int32) * packing.bits
        if packing.method == "awq":
            self._shifts = self._shifts[list(_AWQ_ORDER)]

    def _rows(self, name: str, shape: Sequence[int], rows: slice) -> Tensor:
        prefix = name.removesuffix("weight")
        if f"{prefix}qweight" not in self._paths:
            return super()._rows(name, shape, rows)
        groups = self._groups(prefix, shape)
        num_groups = -(-shape[1] // self._group_size(shape))
        scales = self._part(f"{prefix}scales", (num_groups, shape[0]), DTYPES, rows).float()
        zeros = self._unpacked_columns(f"{prefix}qzeros", (num_groups, shape[0]), rows)
        zeros = zeros.add_(self._packing.zero_offset).bitwise_and_(self._mask)
        integers = self._unpacked(f"{prefix}qweight", shape, rows)
        return integers.sub_(zeros[groups]).float().mul_(scales[groups]).T.contiguous()

    def _group_size(self, shape: Sequence[int]) -> int:
        size = self._packing.group_size
        return shape[1] if size == -1 else size

    def _groups(self, prefix: str, shape: Sequence[int]) -> Tensor:
        """The group of each column: (C_in,)."""
        name, size = f"{prefix}g_idx", self._group_size(shape)
        if name not in self._paths:
            return torch.arange(shape[1]) // size
        groups = self._part(name, (shape[1],), ("I32",)).long()
        if groups.min() < 0 or groups.max() >= -(-shape[1] // size):
            raise CheckpointError(f"{self._folder}: {name!r} names groups that do not exist")
        return groups

    def _unpacked(self, name: str, shape: Sequence[int], rows: slice) -> Tensor:
        """Integers of some rows of the matrix of `shape`, transposed: (C_in, R)."""
        num_rows, num_columns = shape
        if self._packing.method == "awq":
            return self._unpacked_columns(name, (num_columns, num_rows), rows)
        words = self._part(name, (num_columns // len(self._shifts), num_rows), ("I32",), rows)
        return (words[:, None] >> self._shifts[:, None]).bitwise_and_(self._mask).flatten(0, 1)

    def _unpacked_columns(self, name: str, shape: Sequence[int], columns: slice) -> Tensor:
        """Some columns of a table of integers with several columns in a word."""
        per_word = len(self._shifts)
        words = self._part(
            name,
            (shape[0], shape[1] // per_word),
            ("I32",),
            slice(columns.start // per_word, columns.stop // per_word),
        )
        return (words[..., None] >> self._shifts).bitwise_and_(self._mask).flatten(1)

    @property
    def _mask(self) -> int:
        return (1 << self._packing.bits) - 1

    def _part(
        self, name: str, shape: Sequence[int], dtypes: Sequence[str], columns: slice | None = None
    ) -> Tensor:
        """Some columns of the tensor `name`, or all of it."""
        with self._stored(name, shape, dtypes) as stored:
            part: Tensor = stored[:] if columns is None else stored[:, columns]
            return part.clone()
