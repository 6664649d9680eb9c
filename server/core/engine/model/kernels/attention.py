"""Attention by kernels, over keys and values in bfloat16."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.core.engine.model.attention.branches import BranchRun
from server.core.engine.model.attention.segment import Segment
from server.core.engine.model.attention.step import AttentionKind, Run
from server.core.engine.model.kernels import decode, prompt
from server.core.engine.model.kernels.compiling import match_threads

Bits = NDArray[np.uint16]  # of numbers in bfloat16


class DecodeRun:
    """One sampled token of each of B sequences, wherever they are in memory."""

    def __init__(self, row: int, segments: Sequence[Segment]) -> None:
        """row: where the run begins among the step's tokens."""
        self.rows = slice(row, row + len(segments))
        pool = segments[0].pool
        self._num_kv_heads, token_size = pool.num_kv_heads, pool.values[0, 0, ..., 0].numel()
        slots = [
            (s.pool.first_token_of(s.cache.slot) * token_size, s.cache.capacity, s.cache.length)
            for s in segments
        ]
        self._slots = np.array(slots, np.int64).T.copy()
        self._keys, self._values = _arena(pool.keys), _arena(pool.values)

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        num_heads = heads.shape[1] - 2 * self._num_kv_heads
        mixed = np.empty((len(heads), num_heads * heads.shape[2]), np.float32)
        decode.attend(
            heads.numpy(), num_heads, self._keys[layer], self._values[layer], *self._slots, mixed
        )
        return torch.from_numpy(mixed)


class PromptRun:
    """T tokens of a prompt; each attends to those before it and to itself."""

    def __init__(self, row: int, segment: Segment) -> None:
        """row: where the run begins among the step's tokens."""
        self.rows = slice(row, row + len(segment.token_ids))
        self._pool, self._slot, self._begin = segment.pool, segment.cache.slot, segment.cache.length
        assert self._begin + len(segment.token_ids) <= segment.cache.capacity

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        num_heads = heads.shape[1] - 2 * self._pool.num_kv_heads
        mixed = np.empty((len(heads), num_heads * heads.shape[2]), np.float32)
        prompt.attend(
            heads.numpy(), num_heads, _bits(self._pool.keys[layer, self._slot].transpose(1, 2)),
            _bits(self._pool.values[layer, self._slot]), self._begin, mixed,
        )  # fmt: skip
        return torch.from_numpy(mixed)


def _are_decodes(a: Segment, b: Segment) -> bool:
    return a.is_decode and b.is_decode


def _make_run(row: int, segments: Sequence[Segment]) -> Run:
    match_threads()
    if segments[0].is_decode:
        return DecodeRun(row, segments)
    [segment] = segments
    return BranchRun(row, segment) if segment.branches else PromptRun(row, segment)


def _arena(of_pool: Tensor) -> Bits:
    """Keys or values of all pools, (layers, numbers), from those of one."""
    num_layers, layer_size = len(of_pool), of_pool.stride(0)
    return _bits(of_pool.as_strided((num_layers, layer_size), (layer_size, 1), 0))


def _bits(x: Tensor) -> Bits:
    """The same memory; numpy has no bfloat16."""
    bits: Bits = x.view(torch.uint16).numpy()
    return bits


KERNEL_ATTENTION = AttentionKind(torch.bfloat16, _are_decodes, _make_run)
