"""Weights in the safetensors of a folder."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from server.core.engine.checkpoint import CheckpointError
from server.core.engine.model.weights.reader import Lookup, WeightReader
from server.reasons import first_line

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# By safetensors' names. Numbers of other types mean nothing without their scales.
DTYPES = ("F64", "F32", "F16", "BF16")
# Ends the name of the tensor with the rows' scales of a matrix of 8-bit integers ("I8").
SCALES = ".scales"


class SafetensorsReader(WeightReader):
    """The tensors of a checkpoint folder, in one file or many.

    A file is mapped for one block at a time, so that its pages do not stay in memory beside the
    matrices made of them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: dict[str, Path] = {}
        for path in weight_files(folder):
            with _reading(folder, path) as opened:
                self._paths.update(dict.fromkeys(opened.keys(), path))

    def lookup(self, name: str, shape: Sequence[int]) -> Lookup:
        with (
            self._stored(name, shape, self._dtypes(name)),
            _reading(self._folder, self._paths[name]) as opened,
        ):
            stored: Tensor = opened.get_tensor(name)
        scales = self._scales(name, shape[0])

        def rows(ids: Tensor) -> Tensor:
            found = F.embedding(ids, stored).float()
            return found if scales is None else found.mul_(scales[ids, None])

        return rows

    def _rows(self, name: str, shape: Sequence[int], rows: slice) -> Tensor:
        with self._stored(name, shape, self._dtypes(name)) as stored:
            tensor: Tensor = stored[rows].to(torch.float32, copy=True)
        scales = self._scales(name, shape[0])
        return tensor if scales is None else tensor.mul_(scales[rows, None])

    def _dtypes(self, name: str) -> Sequence[str]:
        return (*DTYPES, "I8") if name + SCALES in self._paths else DTYPES

    def _scales(self, name: str, num_rows: int) -> Tensor | None:
        """The factor of each row of the tensor `name`, in float32; None: it has none."""
        if name + SCALES not in self._paths:
            return None
        with self._stored(name + SCALES, (num_rows,), DTYPES) as scales:
            numbers: Tensor = scales[:]
            return numbers.to(torch.float32, copy=True)

    @contextmanager
    def _stored(self, name: str, shape: Sequence[int], dtypes: Sequence[str]) -> Iterator[Any]:
        """Opens the tensor `name`, to be sliced."""
        if name not in self._paths:
            raise CheckpointError(f"{self._folder}: the weights lack {name!r}")
        with _reading(self._folder, self._paths[name]) as opened:
            stored = opened.get_slice(name)
            if list(stored.get_shape()) != list(shape):
                raise CheckpointError(
                    f"{self._folder}: {name!r} has shape {stored.get_shape()}, but config.json "
                    f"asks for {list(shape)}"
                )
            if stored.get_dtype() not in dtypes:
                raise CheckpointError(
                    f"{self._folder}: {name!r} is of type {stored.get_dtype()}; this server reads "
                    f"{', '.join(dtypes)} here and quantizes itself (--dtype)"
                )
            yield stored


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


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights.

    Raises:
        CheckpointError: there are none, or the index of several is damaged.
    """
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
