"""Reads a checkpoint's safetensors, tensor by tensor."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from server.core.engine.checkpoint import CheckpointError
from server.reasons import first_line

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BLOCK_ROWS = 8192
# As safetensors names them; others hold numbers that mean nothing without their scales.
DTYPES = ("F64", "F32", "F16", "BF16")
# Beside a matrix of rows of 8-bit integers ("I8"), by its name and this: a scale for each row.
SCALES = ".scales"


class WeightReader:
    """The tensors of a checkpoint folder by name, in one file or many; nothing is read early.

    A file is mapped for one block at a time, so that what has been read does not stay in
    memory beside what was made of it.

    Raises:
        CheckpointError: a file or tensor is missing, damaged, or not what was asked for.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: dict[str, Path] = {}
        for path in _weight_files(folder):
            with _reading(folder, path) as opened:
                self._paths.update(dict.fromkeys(opened.keys(), path))

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor `name` in float32."""
        return self._in_float32(name, shape, slice(None))

    def blocks(self, name: str, shape: Sequence[int]) -> Iterator[Tensor]:
        """The tensor `name` in float32, some rows at a time."""
        for begin in range(0, shape[0], BLOCK_ROWS):
            yield self._in_float32(name, shape, slice(begin, begin + BLOCK_ROWS))

    def scales(self, name: str, num_rows: int) -> Tensor | None:
        """What each row of the tensor `name` is to be multiplied by, in float32; None: nothing."""
        if name + SCALES not in self._paths:
            return None
        with self._slices(name + SCALES, (num_rows,)) as scales:
            numbers: Tensor = scales[:]
            return numbers.to(torch.float32, copy=True)

    def mapped(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor `name` as it lies in the file, without scales: its pages come to memory when
        used.
        """
        with self._slices(name, shape), _reading(self._folder, self._paths[name]) as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    def _in_float32(self, name: str, shape: Sequence[int], rows: slice) -> Tensor:
        with self._slices(name, shape) as stored:
            tensor: Tensor = stored[rows].to(torch.float32, copy=True)
        scales = self.scales(name, shape[0]) if len(shape) == 2 else None
        return tensor if scales is None else tensor.mul_(scales[rows, None])

    @contextmanager
    def _slices(self, name: str, shape: Sequence[int]) -> Iterator[Any]:
        if name not in self._paths:
            raise CheckpointError(f"{self._folder}: the weights lack {name!r}")
        with _reading(self._folder, self._paths[name]) as opened:
            rows = opened.get_slice(name)
            if list(rows.get_shape()) != list(shape):
                raise CheckpointError(
                    f"{self._folder}: {name!r} has shape {rows.get_shape()}, but config.json "
                    f"asks for {list(shape)}"
                )
            has_scales = len(shape) == 2 and name + SCALES in self._paths
            if rows.get_dtype() not in ((*DTYPES, "I8") if has_scales else DTYPES):
                raise CheckpointError(
                    f"{self._folder}: {name!r} is of type {rows.get_dtype()}; this server reads "
                    f"{', '.join(DTYPES)} and quantizes itself (--dtype)"
                )
            yield rows


def weights_digest(folder: Path) -> str:
    """SHA-256 of the checkpoint's configuration and weights, in hexadecimal; a second a GB or two.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for path in (folder / "config.json", *_weight_files(folder)):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot read the weights: {first_line(error)}") from error
    return digest.hexdigest()


@contextmanager
def _reading(folder: Path, path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the weights are damaged or incomplete ({first_line(error)}); "
            "copy or download them again"
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise CheckpointError(f"{folder} has no weights: {SINGLE_FILE} is missing")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not readable: {error!r}") from error
