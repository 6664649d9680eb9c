"""Attention of one step: every new token over its own sequence, few calls for all of them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from server.core.engine.model.kv_cache import KVCache, KVPool

# Below this many scores a head, two plain products beat F.scaled_dot_product_attention, which
# is made for many; 32 rows over 92 tokens take 121 instead of 197 µs, 256 over 1,024 twice as long.
_MAX_SCORES = 32_768


# A token attends to all positions up to the end of its tile of this many; those behind it are
# masked. So the number of positions depends on where the token stands, and on nothing that it is
# computed with, and its sums are equal to the last bit.
TILE = 128
# The products inside F.scaled_dot_product_attention sum the last rows in another order unless
# there is a multiple of this many.
_ROWS = 4


@dataclass(frozen=True)
class Segment:
    """New tokens of one sequence, T of them; its KV cache has room for them.

    is_decode: whether its only token was sampled. It is then computed together with others'.
    mask: (T, cache.length + T), True where a token may look; None means causal.
    layers: those after which its hidden states are wanted, rising from 1. The segment leaves
    the forward after the last of them. None means the model's last layer.
    """

    token_ids: Sequence[int]
    positions: Sequence[int]
    cache: KVCache
    is_decode: bool = False
    mask: Tensor | None = None
    layers: tuple[int, ...] | None = None

    @property
    def depth(self) -> float:
        """How many layers it passes; infinite: all of them."""
        return self.layers[-1] if self.layers else math.inf

    @property
    def tile_end(self) -> int:
        """Positions that its last token attends to, the masked ones included."""
        return _tile_end(self.cache.length + len(self.token_ids) - 1, self.cache.capacity)


@dataclass(frozen=True)
class _Decodes:
    """Sampled tokens of sequences that lie side by side, one each."""

    rows: slice  # of the step's tokens
    pool: KVPool
    slots: slice
    slot_ids: Tensor  # (B,)
    lengths: Tensor  # (B,): tokens in each cache before this step
    end: int  # S, positions attended to
    mask: Tensor | None  # (B, 1, S, 1), True where a sequence has no token; None: nowhere


class _Tile(NamedTuple):
    """Rows of a prompt that are computed in one call."""

    rows: slice  # of the prompt's new tokens
    end: int  # S, positions attended to
    mask: Tensor  # (T, S), added to the scores, 0 or -inf; T may be rounded up
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Prompt:
    """New tokens of a sequence's prompt, or what is scored behind it."""

    rows: slice  # of the step's tokens
    pool: KVPool
    slot: int
    positions: slice  # where their keys and values go
    tiles: list[_Tile]


class StepAttention:
    """Where the tokens of a step are kept and what they may look at; the same for all layers.

    The tokens must come in the order that `step_order` gives.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        runs = _runs(segments)
        self._runs = [(run, _views(run) if isinstance(run, _Decodes) else []) for run in runs]

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Stores the new keys and values and mixes the values.

        queries: (N, H, D), already scaled. keys, values: (N, H_kv, D). Returns (N, H D).
        N is smaller in layers that the last segments of the step do not reach.
        Does not change the caches' lengths: all layers write at the same place.
        """
        mixed = []
        for run, views in self._runs:
            if run.rows.start >= len(queries):
                break
            rows = (queries[run.rows], keys[run.rows], values[run.rows])
            if isinstance(run, _Prompt):
                mixed.append(_prefill(run, layer, *rows))
            else:
                mixed.append(_decode(run, views[layer], *rows))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


class _LayerViews(NamedTuple):
    """A decode run's part of one layer's KV memory."""

    keys: Tensor  # (B H_kv, S, D)
    values: Tensor  # (B H_kv, D, S)
    new_keys: Tensor  # (H_kv, D), where the keys of the only sequence go; all, if B > 1
    new_values: Tensor


def _views(run: _Decodes) -> list[_LayerViews]:
    """All layers' views at once: a call for each would cost as much as the attention itself."""
    keys, values = run.pool.keys, run.pool.values
    slot = run.slots.start
    if len(run.lengths) == 1:
        position = int(run.lengths[0])
        new_keys, new_values = keys[:, slot, :, position], values[:, slot, :, :, position]
    else:
        new_keys, new_values = keys, values
    parts = (
        keys[:, run.slots, :, : run.end].flatten(1, 2),
        values[:, run.slots, ..., : run.end].flatten(1, 2),
        new_keys,
        new_values,
    )
    return list(map(_LayerViews, *(part.unbind(0) for part in parts)))


def _decode(
    run: _Decodes, views: _LayerViews, queries: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """One token of each sequence. queries: (B, H, D). keys, values: (B, H_kv, D).

    Products of a matrix and a vector along its rows run at the memory's speed in float32,
    twice as fast as F.scaled_dot_product_attention.
    """
    num_sequences, num_kv_heads, head_dim = keys.shape
    if num_sequences == 1:
        views.new_keys.copy_(keys[0])
        views.new_values.copy_(values[0])
    else:
        views.new_keys[run.slot_ids, :, run.lengths] = keys
        views.new_values[run.slot_ids, :, :, run.lengths] = values
    # Query heads that share a key head are columns of one matrix, (B H_kv, D, G); as the
    # transpose of its rows, or bmm takes a path that is three times slower.
    rows = queries.reshape(num_sequences * num_kv_heads, -1, head_dim)
    scores = torch.bmm(views.keys, rows.transpose(1, 2))
    if run.mask is not None:
        scores.view(num_sequences, num_kv_heads, run.end, -1).masked_fill_(run.mask, -torch.inf)
    rows = scores.transpose(1, 2).contiguous().softmax(-1)
    mixed = torch.bmm(views.values, rows.transpose(1, 2))
    return mixed.transpose(1, 2).reshape(num_sequences, -1)


def _prefill(run: _Prompt, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """New tokens of one sequence. queries: (T, H, D). keys, values: (T, H_kv, D)."""
    run.pool.keys[layer, run.slot, :, run.positions] = keys.transpose(0, 1)
    run.pool.values[layer, run.slot, :, :, run.positions] = values.permute(1, 2, 0)
    end = run.tiles[-1].end
    all_keys = run.pool.keys[layer, run.slot, :, :end]
    all_values = run.pool.values[layer, run.slot, ..., :end].transpose(1, 2)
    heads = queries.transpose(0, 1)
    mixed = [
        tile.attend(
            heads[:, tile.rows], all_keys[:, : tile.end], all_values[:, : tile.end], tile.mask
        )
        for tile in run.tiles
    ]
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """queries: (H, T, D). keys, values: (H_kv, S, D). Returns (T, H D).

    mask: (T, S); its rows may be more than the queries, which are then filled up.
    """
    num_rows = queries.shape[1]
    if len(mask) > num_rows:
        queries = F.pad(queries, (0, 0, 0, len(mask) - num_rows))
    attended = F.scaled_dot_product_attention(
        queries[None],
        keys[None],
        # The kernel wants values by rows; the copy is small beside the product.
        values.contiguous()[None],
        attn_mask=mask,
        scale=1.0,
        enable_gqa=len(queries) != len(keys),
    )
    return attended[0, :, :num_rows].transpose(0, 1).flatten(1)


def _attend_by_products(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """The same for few rows, such as a text behind its instruction."""
    num_kv_heads, head_dim = len(keys), keys.shape[-1]
    group = len(queries) // num_kv_heads
    rows = queries.reshape(num_kv_heads, -1, head_dim)
    scores = torch.baddbmm(mask.repeat(group, 1), rows, keys.transpose(1, 2))
    mixed = torch.bmm(scores.softmax(-1), values)
    return mixed.view(len(queries), -1, head_dim).transpose(0, 1).flatten(1)


def step_order(segments: Sequence[Segment]) -> list[int]:
    """The order in which neighbours in memory are neighbours in the step, too.

    Segments that leave the forward early come last, the first to leave at the very end.
    """

    def key(index: int) -> tuple[float, bool, int, int]:
        segment = segments[index]
        cache = segment.cache
        return -segment.depth, not segment.is_decode, cache.capacity, cache.slot

    return sorted(range(len(segments)), key=key)


def _runs(segments: Sequence[Segment]) -> list[_Decodes | _Prompt]:
    runs: list[_Decodes | _Prompt] = []
    begin, row = 0, 0
    while begin < len(segments):
        end = begin + 1
        while end < len(segments) and _are_neighbours(segments[end - 1], segments[end]):
            end += 1
        if segments[begin].is_decode:
            runs.append(_decodes(row, segments[begin:end]))
        else:
            runs.append(_prompt(row, segments[begin]))
        begin, row = end, runs[-1].rows.stop
    return runs


def _are_neighbours(a: Segment, b: Segment) -> bool:
    return (
        a.is_decode
        and b.is_decode
        and a.tile_end == b.tile_end
        and a.cache.pool is b.cache.pool
        and a.cache.slot + 1 == b.cache.slot
    )


def _decodes(row: int, segments: Sequence[Segment]) -> _Decodes:
    first = segments[0]
    assert first.cache.pool is not None
    slots = slice(first.cache.slot, first.cache.slot + len(segments))
    lengths = torch.tensor([segment.cache.length for segment in segments])
    end = first.tile_end
    mask = None
    if (lengths < end - 1).any():
        mask = (torch.arange(end) > lengths[:, None])[:, None, :, None]
    return _Decodes(
        rows=slice(row, row + len(segments)),
        pool=first.cache.pool,
        slots=slots,
        slot_ids=torch.arange(slots.start, slots.stop),
        lengths=lengths,
        end=end,
        mask=mask,
    )


def _prompt(row: int, segment: Segment) -> _Prompt:
    cache, num_tokens = segment.cache, len(segment.token_ids)
    assert cache.pool is not None
    positions = slice(cache.length, cache.length + num_tokens)
    assert positions.stop <= cache.capacity
    mask, tiles = segment.mask, list[_Tile]()
    if mask is None and segment.layers and num_tokens * positions.stop <= _MAX_SCORES:
        mask = torch.ones(num_tokens, positions.stop, dtype=torch.bool).tril(positions.start)
    if mask is None:
        tiles.extend(_tiles(positions, cache.capacity))
    else:
        # A scored prompt need not be the same to the last bit: nothing is drawn behind it.
        attend = _attend_by_products if mask.numel() <= _MAX_SCORES else _attend
        tiles.append(_Tile(slice(num_tokens), positions.stop, _additive(mask), attend))
    return _Prompt(slice(row, row + num_tokens), cache.pool, cache.slot, positions, tiles)


def _tiles(positions: slice, capacity: int) -> Iterator[_Tile]:
    begin = positions.start
    while begin < positions.stop:
        end = _tile_end(begin, capacity)
        num_rows = min(end, positions.stop) - begin
        num_rounded = -(-num_rows // _ROWS) * _ROWS
        mask = _additive(torch.ones(num_rounded, end, dtype=torch.bool).tril(begin))
        row = begin - positions.start
        yield _Tile(slice(row, row + num_rows), end, mask, _attend)
        begin += num_rows


def _additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)


def _tile_end(position: int, capacity: int) -> int:
    return min((position // TILE + 1) * TILE, capacity)
