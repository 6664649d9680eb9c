"""Attention of sampled tokens, one of each of several sequences that are neighbours in memory."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from server.core.engine.model.attention.segment import Segment, split_heads, tile_end
from server.core.engine.model.kv_cache import KVPool


class _LayerViews(NamedTuple):
    """The run's part of one layer's KV memory."""

    keys: Tensor  # (B H_kv, S, D)
    values: Tensor  # (B H_kv, D, S)
    new_keys: Tensor  # (H_kv, D), of the new token if B = 1; else the pool's keys
    new_values: Tensor  # likewise


class DecodeRun:
    """B sampled tokens, each of which attends to S positions of its own sequence.

    Matrix-vector products along the matrix's rows run at the memory's speed in float32, twice as
    fast as F.scaled_dot_product_attention.
    """

    def __init__(self, row: int, segments: Sequence[Segment]) -> None:
        """row: the run's first among the step's tokens. segments: see `are_neighbours`."""
        self.rows = slice(row, row + len(segments))
        self._num_kv_heads = segments[0].pool.num_kv_heads
        self._lengths = torch.tensor([segment.cache.length for segment in segments])
        self._end = end = _end(segments[0])
        slots = slice(segments[0].cache.slot, segments[0].cache.slot + len(segments))
        self._slot_ids = torch.arange(slots.start, slots.stop)
        self._mask: Tensor | None = None  # (B, 1, S, 1), True where a sequence has no token
        if (self._lengths < end - 1).any():
            self._mask = (torch.arange(end) > self._lengths[:, None])[:, None, :, None]
        self._views = _views(segments[0].pool, slots, end, self._lengths)

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        """heads: (B, H + 2 H_kv, D). Returns (B, H D)."""
        queries, keys, values = split_heads(heads, self._num_kv_heads)
        views = self._views[layer]
        num_sequences, num_kv_heads, head_dim = keys.shape
        if num_sequences == 1:
            views.new_keys.copy_(keys[0])
            views.new_values.copy_(values[0])
        else:
            views.new_keys[self._slot_ids, :, self._lengths] = keys
            views.new_values[self._slot_ids, :, :, self._lengths] = values
        # Query heads that share a key head are columns of one matrix, (B H_kv, D, G). It is a
        # transposed view, as bmm is three times slower otherwise.
        rows = queries.reshape(num_sequences * num_kv_heads, -1, head_dim)
        scores = torch.bmm(views.keys, rows.transpose(1, 2))
        if self._mask is not None:
            by_sequence = scores.view(num_sequences, num_kv_heads, self._end, -1)
            by_sequence.masked_fill_(self._mask, -torch.inf)
        rows = scores.transpose(1, 2).contiguous().softmax(-1)
        mixed = torch.bmm(views.values, rows.transpose(1, 2))
        return mixed.transpose(1, 2).reshape(num_sequences, -1)


def are_neighbours(a: Segment, b: Segment) -> bool:
    """Whether b can follow a in one run."""
    return (
        a.is_decode
        and b.is_decode
        and _end(a) == _end(b)
        and a.pool is b.pool
        and a.cache.slot + 1 == b.cache.slot
    )


def _end(segment: Segment) -> int:
    return tile_end(segment.cache.length, segment.cache.capacity)


def _views(pool: KVPool, slots: slice, end: int, lengths: Tensor) -> list[_LayerViews]:
    """Views of all layers at once: a call for each would take as long as the attention itself."""
    keys, values = pool.keys, pool.values
    if len(lengths) == 1:
        slot, position = slots.start, int(lengths[0])
        new_keys, new_values = keys[:, slot, :, position], values[:, slot, :, :, position]
    else:
        new_keys, new_values = keys, values
    parts = (
        keys[:, slots, :, :end].flatten(1, 2),
        values[:, slots, ..., :end].flatten(1, 2),
        new_keys,
        new_values,
    )
    return list(map(_LayerViews, *(part.unbind(0) for part in parts)))
