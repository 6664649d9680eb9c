"""Keys and values of the tokens that running sequences have computed.

Sequences of similar length lie side by side in one tensor, so that a decode step attends
for all of them in one call. Memory grows with use, up to a bound.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

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


@dataclass(eq=False)
class KVPool:
    """Slots of one capacity; those of `caches` come first, without gaps.

    keys: (layers, slots, H_kv, capacity, D). values: (layers, slots, H_kv, D, capacity):
    transposed, so that a decode step reads both along their rows, at the memory's speed.
    """

    capacity: int
    keys: Tensor
    values: Tensor
    caches: list[KVCache] = field(default_factory=list)

    def view(self, slot: int, length: int) -> KVPrefix:
        """The first tokens of a slot, in place."""
        return KVPrefix(self.keys[:, slot], self.values[:, slot]).first(length)


class KVMemory:
    """Gives sequences their slots; a sequence that outgrows its slot moves to a larger one."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_tokens: int,
        max_context: int,
    ) -> None:
        """max_tokens: room of all slots together. max_context: that of the largest slot."""
        assert max_tokens >= max_context
        self._num_layers, self._num_kv_heads, self._head_dim = num_layers, num_kv_heads, head_dim
        self._max_tokens = max_tokens
        self._capacities = [max_context]
        while (smaller := MIN_CAPACITY << (len(self._capacities) - 1)) < max_context:
            self._capacities.insert(-1, smaller)
        self._pools: dict[int, KVPool] = {}

    @property
    def num_tokens(self) -> int:
        """Room of all slots in use, filled or not."""
        # A copy at once: metrics ask from another thread.
        return sum(pool.capacity * len(pool.caches) for pool in list(self._pools.values()))

    @property
    def num_sequences(self) -> int:
        """Slots in use."""
        return sum(len(pool.caches) for pool in self._pools.values())

    def reserve(self, cache: KVCache, num_tokens: int) -> bool:
        """Makes room for `num_tokens` behind the cache's length; False if memory is short."""
        needed = cache.length + num_tokens
        if needed <= cache.capacity:
            return True
        capacity = next(c for c in self._capacities if c >= needed)
        if self.num_tokens - cache.capacity + capacity > self._max_tokens:
            return False
        old, old_slot, length = cache.pool, cache.slot, cache.length
        pool = self._add(cache, capacity)
        if old is not None:
            pool.view(cache.slot, length).copy_(old.view(old_slot, length))
            self._remove(old, old_slot)
        return True

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
            self._remove(cache.pool, cache.slot)
        cache.pool, cache.slot, cache.length = None, 0, 0

    def _add(self, cache: KVCache, capacity: int) -> KVPool:
        pool = self._pools.get(capacity)
        if pool is None:
            pool = self._pools[capacity] = KVPool(capacity, *self._allocate(1, capacity))
        num_slots = pool.keys.shape[1]
        if len(pool.caches) == num_slots:
            keys, values = self._allocate(2 * num_slots, capacity)
            keys[:, :num_slots], values[:, :num_slots] = pool.keys, pool.values
            pool.keys, pool.values = keys, values
        cache.pool, cache.slot = pool, len(pool.caches)
        pool.caches.append(cache)
        return pool

    def _remove(self, pool: KVPool, slot: int) -> None:
        """Closes the gap with the last slot, so that neighbours stay neighbours."""
        last = pool.caches.pop()
        if slot < len(pool.caches):
            pool.view(slot, last.length).copy_(pool.view(last.slot, last.length))
            last.slot = slot
            pool.caches[slot] = last
        if not pool.caches:
            del self._pools[pool.capacity]

    def _allocate(self, num_slots: int, capacity: int) -> tuple[Tensor, Tensor]:
        first, size = (self._num_layers, num_slots, self._num_kv_heads), self._head_dim
        # float32 whatever the weights are: faster than bfloat16 on a CPU, and exact.
        return torch.zeros(*first, capacity, size), torch.zeros(*first, size, capacity)
