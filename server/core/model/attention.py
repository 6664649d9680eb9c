"""Attention of one step: every new token over its own sequence, few calls for all of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from server.core.model.kv_cache import KVCache, KVPool

# Below this many scores a head, two plain products beat F.scaled_dot_product_attention, which
# is made for many; 32 rows over 92 tokens take 121 instead of 197 µs, 256 over 1,024 twice as long.
_MAX_SCORES = 32_768


# A decode attends to a multiple of this many positions; those beyond its length are masked. So a
# sequence has the same number of positions in a shared call as alone, and the same sums to the
# last bit.
DECODE_POSITIONS = 128


@dataclass(frozen=True)
class Segment:
    """New tokens of one sequence, T of them; its KV cache has room for them.

    mask: (T, cache.length + T), True where a token may look; None means causal.
    layers: those after which its hidden states are wanted, rising from 1. The segment leaves
    the forward after the last of them. None means the model's last layer.
    """

    token_ids: Sequence[int]
    positions: Sequence[int]
    cache: KVCache
    mask: Tensor | None = None
    layers: tuple[int, ...] | None = None

    @property
    def depth(self) -> float:
        """How many layers it passes; infinite: all of them."""
        return self.layers[-1] if self.layers else math.inf

    @property
    def is_decode(self) -> bool:
        """Whether it has one token, which then may look everywhere."""
        return len(self.token_ids) == 1

    @property
    def num_decode_positions(self) -> int:
        """Positions that its only token attends to, the masked ones included."""
        num_positions = -(-(self.cache.length + 1) // DECODE_POSITIONS) * DECODE_POSITIONS
        return min(num_positions, self.cache.capacity)


@dataclass(frozen=True)
class _Run:
    """Segments that are computed in one call: one of any length, or decodes side by side."""

    rows: slice  # of the step's tokens
    pool: KVPool
    slots: slice
    slot_ids: Tensor  # (B,)
    lengths: Tensor  # (B,): tokens in each cache before this step
    num_sequences: int  # B
    num_tokens: int  # T, of each
    end: int  # S, with the new tokens; of decodes with the masked positions
    # Prefill: (T, S), added to the scores, 0 or -inf; None is causal without a past.
    # Decode: (B, 1, S, 1), True where a sequence has no token; None if all are of one length.
    mask: Tensor | None


class StepAttention:
    """Where the tokens of a step are kept and what they may look at; the same for all layers.

    The tokens must come in the order that `step_order` gives.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        runs = _runs(segments)
        self._runs = [(run, _decode_views(run) if run.num_tokens == 1 else None) for run in runs]

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
            if views is None:
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


def _decode_views(run: _Run) -> list[_LayerViews]:
    """All layers' views at once: a call for each would cost as much as the attention itself."""
    keys, values = run.pool.keys, run.pool.values
    slot = run.slots.start
    if run.num_sequences == 1:
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


def _decode(run: _Run, views: _LayerViews, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
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


def _prefill(run: _Run, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """New tokens of one sequence. queries: (T, H, D). keys, values: (T, H_kv, D)."""
    queries, keys, values = (x.transpose(0, 1) for x in (queries, keys, values))
    slot, new = run.slots.start, slice(run.end - run.num_tokens, run.end)
    run.pool.keys[layer, slot, :, new] = keys
    run.pool.values[layer, slot, :, :, new] = values.transpose(1, 2)
    if new.start:
        keys = run.pool.keys[layer, slot, :, : run.end]
        values = run.pool.values[layer, slot, ..., : run.end].transpose(1, 2)
    if run.mask is not None and run.mask.numel() <= _MAX_SCORES:
        return _few(queries, keys, values, run.mask)
    if new.start:
        # The kernel wants values by rows; the copy is small beside the product.
        values = values.contiguous()
    attended = F.scaled_dot_product_attention(
        queries[None],
        keys[None],
        values[None],
        attn_mask=run.mask,
        is_causal=run.mask is None,
        scale=1.0,
        enable_gqa=len(queries) != len(keys),
    )
    return attended[0].transpose(0, 1).flatten(1)


def _few(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """A short prompt behind a known one, such as a text behind its instruction.

    queries: (H, T, D). keys, values: (H_kv, S, D). mask: (T, S).
    """
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


def _runs(segments: Sequence[Segment]) -> list[_Run]:
    runs, begin, row = [], 0, 0
    while begin < len(segments):
        end = begin + 1
        while end < len(segments) and _are_neighbours(segments[end - 1], segments[end]):
            end += 1
        together = segments[begin:end]
        run = _run(row, together)
        runs.append(run)
        begin, row = end, run.rows.stop
    return runs


def _are_neighbours(a: Segment, b: Segment) -> bool:
    return (
        a.is_decode
        and b.is_decode
        and a.depth == b.depth
        and a.num_decode_positions == b.num_decode_positions
        and a.cache.pool is b.cache.pool
        and a.cache.slot + 1 == b.cache.slot
    )


def _run(row: int, segments: Sequence[Segment]) -> _Run:
    first, num_tokens = segments[0], len(segments[0].token_ids)
    assert first.cache.pool is not None
    assert all(s.cache.length + num_tokens <= s.cache.capacity for s in segments)
    slots = slice(first.cache.slot, first.cache.slot + len(segments))
    lengths = torch.tensor([segment.cache.length for segment in segments])
    is_decode = num_tokens == 1
    end = first.num_decode_positions if is_decode else first.cache.length + num_tokens
    mask = None
    if not is_decode and (first.mask is not None or num_tokens < end):
        may_look = first.mask
        if may_look is None:
            may_look = torch.ones(num_tokens, end, dtype=torch.bool).tril(end - num_tokens)
        mask = torch.zeros(num_tokens, end).masked_fill_(~may_look, -torch.inf)
    elif is_decode and (lengths < end - 1).any():
        mask = (torch.arange(end) > lengths[:, None])[:, None, :, None]
    return _Run(
        rows=slice(row, row + num_tokens * len(segments)),
        pool=first.cache.pool,
        slots=slots,
        slot_ids=torch.arange(slots.start, slots.stop),
        lengths=lengths,
        num_sequences=len(segments),
        num_tokens=num_tokens,
        end=end,
        mask=mask,
    )
