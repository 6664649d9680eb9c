"""Keys and values of the tokens that running sequences have computed.

Sequences of similar length lie side by side in one tensor, so that a decode step attends
for all of them in one call. All memory is reserved at the start; a move allocates no more than
one layer of one sequence.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from server.core.engine.model.arena import Arena

MIN_CAPACITY = 128


@dataclass(eq=False)
class KVCache:
    """One sequence's place in the KV memory. `length` tokens are computed."""

    length: int = 0
    pool: "KVPool | None" = field(default=None, repr=False)
    slot: int = 0

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.pool.capacity if self.pool else 0

    def first(self, length: int, num_layers: int) -> "KVPrefix":
        """Its first tokens in the first layers, in place."""
        assert self.pool is not None
        assert 0 < length <= self.length
        return self.pool.view(self.slot, length).first(length, num_layers)


@dataclass(frozen=True)
class KVPrefix:
    """Computed tokens of one sequence.

    keys: (layers, H_kv, length, D). values: (layers, H_kv, D, length).
    """

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    @property
    def num_layers(self) -> int:
        return self.keys.shape[0]

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def first(self, length: int, num_layers: int | None = None) -> "KVPrefix":
        """Its first tokens in the first layers (None: in all), in the same memory."""
        return KVPrefix(self.keys[:num_layers, :, :length], self.values[:num_layers, ..., :length])

    def layer(self, index: int) -> "KVPrefix":
        """All of it in one layer, in the same memory."""
        return KVPrefix(self.keys[index : index + 1], self.values[index : index + 1])

    def clone(self) -> "KVPrefix":
        """The same in memory of its own, and no more of it."""
        return KVPrefix(
            self.keys.clone(memory_format=torch.contiguous_format),
            self.values.clone(memory_format=torch.contiguous_format),
        )

    def copy_(self, other: "KVPrefix") -> None:
        """Overwrites this one."""
        self.keys.copy_(other.keys)
        self.values.copy_(other.values)


class _Copy(NamedTuple):
    """Tokens of a sequence that gets another slot, in both slots."""

    source: KVPrefix
    target: KVPrefix


@dataclass(eq=False)
class KVPool:
    """Slots of one capacity; `caches` use those from `begin` on, in order and without gaps.

    keys: (layers, slots, H_kv, capacity, D). values: (layers, slots, H_kv, D, capacity):
    transposed, so that a decode step reads both along their rows, at the memory's speed.
    Both are views of the whole arena; other pools may use the memory of the other slots.
    """

    capacity: int
    keys: Tensor
    values: Tensor
    first_token: int  # of the arena: where slot 0 begins
    begin: int = 0
    caches: list[KVCache] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Room of its slots in use."""
        return len(self.caches) * self.capacity

    @property
    def tokens(self) -> range:
        """Where in the arena its slots in use are."""
        first = self.first_token + self.begin * self.capacity
        return range(first, first + self.num_tokens)

    def view(self, slot: int, length: int) -> KVPrefix:
        """The first tokens of a slot, in place."""
        return KVPrefix(self.keys[:, slot], self.values[:, slot]).first(length)

    def move(self, cache: KVCache, slot: int) -> _Copy:
        """Gives the cache another slot; the caller runs the copy."""
        copy = _Copy(self.view(cache.slot, cache.length), self.view(slot, cache.length))
        cache.slot = slot
        return copy

    def shift(self, begin: int) -> list[_Copy]:
        """Uses the slots from `begin` on instead. A cache whose slot is among them keeps it."""
        distance, self.begin = begin - self.begin, begin
        num = len(self.caches)
        # To the right the first caches move behind the last one; to the left, the reverse.
        split = min(distance, num) if distance > 0 else max(num + distance, 0)
        front, back = self.caches[:split], self.caches[split:]
        self.caches = back + front
        if distance > 0:
            return [self.move(cache, cache.slot + max(distance, num)) for cache in front]
        return [self.move(cache, cache.slot + min(distance, -num)) for cache in back]


class KVMemory:
    """Gives sequences their slots; a sequence that outgrows its slot moves to a larger one.

    The pools lie in the arena by capacity, the largest first, with gaps where slots were freed.
    The slots of max_context tokens lie at the arena's end, new ones in front of the others.
    Every other capacity is a multiple of all smaller ones. So a gap is a whole number of slots of
    the pool behind it, and that pool shifts by moving slots from its one end to its other end.
    No copy overlaps its source, and at need all gaps close: the last token can be used.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, *, max_tokens: int,
        max_context: int,
    ) -> None:  # fmt: skip
        """max_tokens: room of all slots together. max_context: that of the largest slot.

        Raises:
            OSError: the system refuses as much memory.
        """
        assert max_tokens >= max_context
        self._max_tokens = max_tokens
        self._arena = Arena(num_layers, num_kv_heads, head_dim, num_tokens=max_tokens)
        capacities = [MIN_CAPACITY]
        while capacities[0] < max_context:
            capacities.insert(0, 2 * capacities[0])
        self._doubling = [KVPool(c, *self._arena.slots(c, 0), 0) for c in capacities[1:]]
        first_token = max_tokens % max_context
        slots = self._arena.slots(max_context, first_token)
        self._last = KVPool(max_context, *slots, first_token, begin=slots[0].shape[1])
        self._pools = (*self._doubling, self._last)  # in the order of the arena
        self._rising = (*reversed(self._doubling), self._last)  # by capacity

    @property
    def num_tokens(self) -> int:
        """Room of all slots in use, filled or not. Any thread."""
        return sum(pool.num_tokens for pool in self._pools)

    @property
    def num_sequences(self) -> int:
        """Slots in use."""
        return sum(len(pool.caches) for pool in self._pools)

    def reserve(self, cache: KVCache, num_tokens: int) -> bool:
        """Makes room for `num_tokens` behind the cache's length; False if memory is short."""
        needed = cache.length + num_tokens
        if needed <= cache.capacity:
            return True
        pool = next(p for p in self._rising if p.capacity >= needed)
        if self.num_tokens - cache.capacity + pool.capacity > self._max_tokens:
            return False
        if cache.pool is None:
            for source, target in self._add(cache, pool):
                target.copy_(source)
        else:
            self._replace(cache, pool)
        return True

    def fits(self, num_tokens: int, freed: Collection[KVCache]) -> bool:
        """Whether there would be room for another sequence if these were freed."""
        capacity = next(p.capacity for p in self._rising if p.capacity >= num_tokens)
        num_used = self.num_tokens - sum(cache.capacity for cache in freed)
        return num_used + capacity <= self._max_tokens

    def fill(self, cache: KVCache, prefix: KVPrefix) -> None:
        """Starts an empty cache, which has room for it, with a copy of the prefix.

        Layers that the prefix does not have stay as they were.
        """
        assert cache.pool is not None
        slot = cache.pool.view(cache.slot, prefix.length)
        slot.first(prefix.length, prefix.num_layers).copy_(prefix)
        cache.length = prefix.length

    def free(self, cache: KVCache, *, is_sound: bool = True) -> None:
        """Gives the slot back. Harmless if there is none.

        is_sound: whether all it holds are numbers. What is left in a slot meets the next
        sequence's masked places, where neither -inf nor a weight of 0 takes away a NaN.
        """
        if cache.pool is not None:
            if not is_sound:
                cache.pool.keys[:, cache.slot] = 0
                cache.pool.values[:, cache.slot] = 0
            for source, target in self._remove(cache):
                target.copy_(source)
        cache.pool, cache.slot, cache.length = None, 0, 0

    def rest(self) -> None:
        """Gives the memory of free slots back to the system."""
        begin = 0
        for pool in self._pools:
            if pool.caches:
                self._arena.give_back(begin, pool.tokens.start)
                begin = pool.tokens.stop
        self._arena.give_back(begin, self._max_tokens)

    def _replace(self, cache: KVCache, pool: KVPool) -> None:
        """Moves the cache to a slot of the pool; its own slot counts as free already.

        The two slots may overlap, so each layer is saved before anything in this layer moves.
        """
        assert cache.pool is not None
        own = cache.pool.view(cache.slot, cache.length)
        saved = own.layer(0).clone()  # before anything changes, for this may fail
        copies = self._remove(cache) + self._add(cache, pool)
        new = pool.view(cache.slot, cache.length)
        for layer in range(own.num_layers):
            saved.copy_(own.layer(layer))
            for source, target in copies:
                target.layer(layer).copy_(source.layer(layer))
            new.layer(layer).copy_(saved)

    def _add(self, cache: KVCache, pool: KVPool) -> list[_Copy]:
        copies = self._make_room(pool)
        cache.pool = pool
        if pool is self._last:
            pool.begin -= 1
            cache.slot = pool.begin
            pool.caches.insert(0, cache)
        else:
            cache.slot = pool.begin + len(pool.caches)
            pool.caches.append(cache)
        return copies

    def _remove(self, cache: KVCache) -> list[_Copy]:
        """Moves the pool's outermost cache to the slot, so that neighbours stay neighbours."""
        pool, slot = cache.pool, cache.slot
        assert pool is not None
        if pool is self._last:
            pool.begin += 1
            outermost = pool.caches.pop(0)
        else:
            outermost = pool.caches.pop()
        if outermost is cache:
            return []
        pool.caches[slot - pool.begin] = outermost
        return [pool.move(outermost, slot)]

    def _make_room(self, growing: KVPool) -> list[_Copy]:
        """Shifts pools, no further than needed, so that `growing` can have another slot.

        Run in this order, the copies overwrite nothing that is still to be copied.
        """
        *sizes, last = [p.num_tokens + p.capacity * (p is growing) for p in self._pools]
        num_free = self._max_tokens - last - sum(sizes)
        assert num_free >= 0
        shifts = []
        end = num_used = 0  # of the pools so far: where they end, and their tokens
        for pool, size in zip(self._doubling, sizes, strict=True):
            latest = num_used + num_free  # or the pools behind would not fit
            begin = max(end // pool.capacity, min(pool.begin, latest // pool.capacity))
            shifts.append((pool, begin))
            end = begin * pool.capacity + size
            num_used += size
        to_left = [(pool, begin) for pool, begin in shifts if begin < pool.begin]
        to_right = [(pool, begin) for pool, begin in shifts if begin > pool.begin]
        return [
            copy for pool, begin in (*to_left, *reversed(to_right)) for copy in pool.shift(begin)
        ]
