"""Reads a checkpoint's safetensors, tensor by tensor."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from server.core.checkpoint import CheckpointError, first_line

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class WeightReader:
    """The tensors of a checkpoint folder by name, in one file or many; nothing is read early."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._folder, self._dtype = folder, dtype
        self._stack = ExitStack()
        self._by_name: dict[str, Any] = {}

    def __enter__(self) -> "WeightReader":
        try:
            for path in _weight_files(self._folder):
                opened = self._stack.enter_context(safe_open(path, framework="pt"))
                self._by_name.update(dict.fromkeys(opened.keys(), opened))
        except (OSError, SafetensorError) as error:
            self._stack.close()
            raise CheckpointError(
                f"{self._folder}: the weights are damaged or incomplete ({first_line(error)}); "
                "copy or download them again"
            ) from error
        except CheckpointError:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._by_name.clear()
        self._stack.close()

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor `name`, converted to the reader's dtype.

        Raises:
            CheckpointError: it is missing, damaged or of another shape.
        """
        if name not in self._by_name:
            raise CheckpointError(f"{self._folder}: the weights lack {name!r}")
        try:
            tensor: Tensor = self._by_name[name].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self._folder}: {name!r} is not readable: {first_line(error)}"
            ) from error
        if list(tensor.shape) != list(shape):
            raise CheckpointError(
                f"{self._folder}: {name!r} has shape {list(tensor.shape)}, but config.json "
                f"asks for {list(shape)}"
            )
        return tensor.to(self._dtype)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise CheckpointError(f"{folder} has no weights: {SINGLE_FILE} is missing")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not readable: {error!r}") from error
    return [folder / name for name in sorted(names)]
