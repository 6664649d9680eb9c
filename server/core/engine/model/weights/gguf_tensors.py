"""Weights in a GGUF, in the types that llama.cpp quantizes to."""

import math
from collections.abc import Sequence

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from torch import Tensor

from server.core.engine.checkpoint import CheckpointError
from server.core.engine.gguf_file import GGUF, StoredTensor
from server.core.engine.model.weights.reader import Lookup, WeightReader
from server.reasons import first_line

KINDS = (
    Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1,
    Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS,
)  # fmt: skip
# By the architecture's name in a file, for gguf's names of tensors.
_ARCHITECTURES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


class GGUFReader(WeightReader):
    """The tensors of a GGUF. Blocks of rows are read; only `lookup` maps the file."""

    def __init__(self, file: GGUF) -> None:
        arch = file.architecture
        self._file = file
        self._names = gguf.get_tensor_name_map(_ARCHITECTURES[arch], file[f"{arch}.block_count"])

    def lookup(self, name: str, shape: Sequence[int]) -> Lookup:
        stored = self._stored(name, shape)
        mapped = np.memmap(
            self._file.path, np.uint8, "r", stored.offset, (shape[0], _row_bytes(stored))
        )
        return lambda ids: _dequantized(mapped[ids.numpy()], stored)

    def _rows(self, name: str, shape: Sequence[int], rows: slice) -> Tensor:
        stored = self._stored(name, shape)
        num_bytes = _row_bytes(stored)
        try:
            data = np.fromfile(
                self._file.path,
                np.uint8,
                (rows.stop - rows.start) * num_bytes,
                offset=stored.offset + rows.start * num_bytes,
            )
        except OSError as error:
            raise CheckpointError(
                f"{self._file}: cannot read the weights: {first_line(error)}"
            ) from error
        return _dequantized(data.reshape(-1, num_bytes), stored)

    def _stored(self, name: str, shape: Sequence[int]) -> StoredTensor:
        own_name = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        stored = self._file.stored(own_name or name)
        if stored.shape != tuple(shape):
            raise CheckpointError(
                f"{self._file}: {own_name!r} has shape {list(stored.shape)}, but the metadata ask "
                f"for {list(shape)}"
            )
        if stored.kind not in KINDS or math.prod(shape[1:]) % GGML_QUANT_SIZES[stored.kind][0]:
            raise CheckpointError(
                f"{self._file}: {own_name!r} is of type {stored.kind.name}; this server reads "
                f"{', '.join(kind.name for kind in KINDS)}"
            )
        return stored


def _row_bytes(stored: StoredTensor) -> int:
    return stored.num_bytes // stored.shape[0]


def _dequantized(rows: NDArray[np.uint8], stored: StoredTensor) -> Tensor:
    """rows: (N, bytes of a row), contiguous. Returns (N, ...) in float32, in memory of its own."""
    numbers = gguf.quants.dequantize(rows, stored.kind)
    return torch.from_numpy(numbers).view(len(rows), *stored.shape[1:])
