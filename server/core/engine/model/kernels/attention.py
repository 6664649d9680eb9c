"""Attention in kernels, over keys and values in bfloat16."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from server.core.engine.model.attention.branches import BranchRun
from server.core.engine.model.attention.segment import Segment
from server.core.engine.model.attention.step import AttentionKind, Run
from server.core.engine.model.kernels import attend
from server.core.engine.model.kernels.compiling import match_threads
from server.core.engine.model.kernels.dots import TILE
from server.core.engine.model.kv_layout import KVLayout, Shape

Bits = NDArray[np.uint16]  # of numbers in bfloat16


class KernelRun:
    """New tokens, sampled or of prompts, of any sequences in memory."""

    def __init__(self, row: int, segments: Sequence[Segment]) -> None:
        """row: the run's first among the step's tokens."""
        rows, items = list[tuple[int, int, int]](), list[tuple[int, int, int]]()
        for segment in segments:
            cache, num_tokens = segment.cache, len(segment.token_ids)
            assert cache.length + num_tokens <= cache.capacity
            items += _items(len(rows), cache.length, num_tokens)
            begin = segment.pool.first_token_of(cache.slot)
            rows += [(begin, cache.capacity, cache.length + i) for i in range(num_tokens)]
        self.rows = slice(row, row + len(rows))
        self._places, self._items = np.array(rows, np.int64), _distributed(items)
        pool = segments[0].pool
        self._num_kv_heads = pool.num_kv_heads
        self._keys, self._values = _arena(pool.keys), _arena(pool.values)

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        num_heads = heads.shape[1] - 2 * self._num_kv_heads
        mixed = np.empty((len(heads), num_heads * heads.shape[2]), np.float32)
        memory = self._keys[layer], self._values[layer]
        attend.store(heads.numpy(), num_heads, *memory, self._places)
        attend.attend(heads.numpy(), num_heads, *memory, self._places, self._items, mixed)
        return torch.from_numpy(mixed)


def _items(row: int, position: int, num_tokens: int) -> Iterator[tuple[int, int, int]]:
    """Work items for tokens of one sequence, from `row` and `position` on."""
    for i in range(0, num_tokens, attend.MAX_ITEM_TOKENS):
        num = min(attend.MAX_ITEM_TOKENS, num_tokens - i)
        for chunk in range((position + i + num - 1) // attend.CHUNK + 1):
            yield row + i, num, chunk


def _distributed(items: list[tuple[int, int, int]]) -> NDArray[np.int64]:
    """Assigns the items to the threads in turn, as later tokens of a prompt take longer."""
    num_parts = torch.get_num_threads()
    by_thread = [item for part in range(num_parts) for item in items[part::num_parts]]
    return np.array(by_thread, np.int64)


def _are_neighbours(a: Segment, b: Segment) -> bool:
    return not a.branches and not b.branches and a.depth == b.depth


def _make_run(row: int, segments: Sequence[Segment]) -> Run:
    if segments[0].branches:
        [segment] = segments
        return BranchRun(row, segment)
    match_threads()
    return KernelRun(row, segments)


def _arena(pool: Tensor) -> Bits:
    """The keys or values of the whole arena, (layers, numbers), from those of a pool."""
    num_layers, layer_size = len(pool), pool.stride(0)
    # numpy has no bfloat16.
    whole = pool.as_strided((num_layers, layer_size), (layer_size, 1), 0)
    bits: Bits = whole.view(torch.uint16).numpy()
    return bits


def _shapes(capacity: int, head_dim: int) -> tuple[Shape, Shape]:
    num_blocks = capacity // TILE
    return (
        (num_blocks, head_dim // 2, TILE, 2),
        (num_blocks, head_dim // TILE, TILE // 2, TILE, 2),
    )


def _by_token(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    num_heads, num_blocks, num_pairs = keys.shape[:3]
    # Both with contiguous positions: with other strides, the order of sums in PyTorch's product
    # depends on the number of rows.
    return (
        keys.permute(0, 2, 4, 1, 3).reshape(num_heads, 2 * num_pairs, num_blocks * TILE).mT,
        values.permute(0, 2, 4, 1, 3, 5).reshape(num_heads, 2 * num_pairs, num_blocks * TILE),
    )


def _laid_out(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    *first, num_tokens, head_dim = keys.shape
    missing = -num_tokens % TILE
    keys = F.pad(keys, (0, 0, 0, missing)).view(*first, -1, TILE, head_dim // 2, 2)
    values = F.pad(values, (0, missing)).view(*first, head_dim // TILE, TILE, -1, TILE // 2, 2)
    # Blocks come first; then, in a block, the dimensions of a key or the positions of a value.
    return keys.transpose(-2, -3), values.movedim(-3, -5).movedim(-2, -3)


IN_BLOCKS = KVLayout(torch.bfloat16, TILE, _shapes, 0, _by_token, _laid_out)
KERNEL_ATTENTION = AttentionKind(IN_BLOCKS, _are_neighbours, _make_run)
