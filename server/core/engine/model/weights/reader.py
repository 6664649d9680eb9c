"""The interface by which a model reads its weights, whatever their format."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

BLOCK_ROWS = 2048


class Lookup(Protocol):
    """Reads rows of a matrix that stays in its file."""

    def __call__(self, ids: Tensor) -> Tensor:
        """(N,) -> (N, C)."""


class WeightReader(ABC):
    """The tensors of a checkpoint by their names in transformers, read on demand.

    Raises:
        CheckpointError: a file or tensor is missing or damaged, or has another shape or type.
    """

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor `name` in float32."""
        tensor, begin = torch.empty(*shape), 0
        for block in self.blocks(name, shape):
            tensor[begin : (begin := begin + len(block))] = block
        return tensor

    def blocks(self, name: str, shape: Sequence[int]) -> Iterator[Tensor]:
        """The tensor `name` in float32, some rows at a time."""
        for begin in range(0, shape[0], BLOCK_ROWS):
            yield self._rows(name, shape, slice(begin, min(begin + BLOCK_ROWS, shape[0])))

    @abstractmethod
    def lookup(self, name: str, shape: Sequence[int]) -> Lookup:
        """Looks up rows of the tensor `name`; their pages are loaded when used."""

    @abstractmethod
    def _rows(self, name: str, shape: Sequence[int], rows: slice) -> Tensor:
        """Some rows of the tensor `name`, in float32 and in memory of their own."""
