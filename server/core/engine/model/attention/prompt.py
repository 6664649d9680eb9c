"""Attention of new tokens of one prompt."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from server.core.engine.model.attention.segment import Segment, rounded, split_heads, tile_end

# Up to this many positions two plain products are faster than F.scaled_dot_product_attention: 32
# rows over 128 take 129 instead of 160 µs. 128 rows over 2,048 take three times as long.
_MAX_FOR_PRODUCTS = 512


class _Tile(NamedTuple):
    """Rows of a prompt that attend to the same number of positions, in one call."""

    rows: slice  # of the prompt's new tokens
    end: int  # S, positions attended to
    mask: Tensor  # (T, S), added to the scores, 0 or -inf; T is `rounded`
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class PromptRun:
    """T tokens of a prompt; each attends to those before it and to itself."""

    def __init__(self, row: int, segment: Segment) -> None:
        """row: the run's first among the step's tokens."""
        cache, num_tokens = segment.cache, len(segment.token_ids)
        self.rows = slice(row, row + num_tokens)
        self._pool, self._slot = segment.pool, cache.slot
        self._positions = slice(cache.length, cache.length + num_tokens)
        assert self._positions.stop <= cache.capacity
        self._tiles = list(_tiles(self._positions, cache.capacity))

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        """heads: (T, H + 2 H_kv, D). Returns (T, H D)."""
        queries, keys, values = split_heads(heads, self._pool.num_kv_heads)
        all_keys, all_values = (
            self._pool.keys[layer, self._slot],
            self._pool.values[layer, self._slot],
        )
        all_keys[:, self._positions] = keys.transpose(0, 1)
        all_values[..., self._positions] = values.permute(1, 2, 0)
        all_values = all_values.transpose(1, 2)
        queries = queries.transpose(0, 1)
        mixed = []
        for tile in self._tiles:
            rows = queries[:, tile.rows]
            num_rows = rows.shape[1]
            if num_missing := len(tile.mask) - num_rows:
                rows = F.pad(rows, (0, 0, 0, num_missing))
            keys_and_values = all_keys[:, : tile.end], all_values[:, : tile.end]
            mixed.append(tile.attend(rows, *keys_and_values, tile.mask)[:, :num_rows])
        tiles = mixed[0] if len(mixed) == 1 else torch.cat(mixed, 1)
        return tiles.transpose(0, 1).flatten(1)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """queries: (H, T, D). keys, values: (H_kv, S, D). mask: (T, S). Returns (H, T, D)."""
    attended: Tensor = F.scaled_dot_product_attention(
        queries[None],
        keys[None],
        # The kernel needs contiguous values; copying them costs little beside the product.
        values.contiguous()[None],
        attn_mask=mask,
        scale=1.0,
        enable_gqa=len(queries) != len(keys),
    )
    return attended[0]


def _attend_by_products(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """As `_attend`, but faster for few positions."""
    num_kv_heads, head_dim = len(keys), keys.shape[-1]
    scores = torch.bmm(queries.reshape(num_kv_heads, -1, head_dim), keys.transpose(1, 2))
    scores.view(num_kv_heads, -1, *mask.shape).add_(mask)
    return torch.bmm(scores.softmax(-1), values).view(queries.shape)


def _tiles(positions: slice, capacity: int) -> Iterator[_Tile]:
    begin = positions.start
    while begin < positions.stop:
        end = tile_end(begin, capacity)
        num_rows = min(end, positions.stop) - begin
        is_masked = torch.ones(rounded(num_rows), end, dtype=torch.bool).triu(begin + 1)
        mask = torch.zeros(is_masked.shape).masked_fill_(is_masked, -torch.inf)
        row = begin - positions.start
        attend = _attend_by_products if end <= _MAX_FOR_PRODUCTS else _attend
        yield _Tile(slice(row, row + num_rows), end, mask, attend)
        begin += num_rows
