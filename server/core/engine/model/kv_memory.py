"""Gives running sequences slots for their keys and values, all in one arena.

All memory is reserved at the start; a move allocates no more than one layer of one sequence.
"""

from collections.abc import Collection

from server.core.engine.model.arena import Arena
from server.core.engine.model.kv_cache import Copy, KVCache, KVPool, KVPrefix
from server.core.engine.model.kv_layout import BY_TOKEN, KVLayout

MIN_CAPACITY = 128


class KVMemory:
    """Gives sequences their slots; a sequence that outgrows its slot moves to a larger one.

    The pools lie in the arena by capacity, the largest first, with gaps where slots were freed.
    The slots of max_context tokens lie at the arena's end, new ones in front of the others.
    Every other capacity is a multiple of all smaller ones. So a gap is a whole number of slots of
    the pool behind it, and that pool shifts by moving slots from its one end to its other end.
    No copy overlaps its source, and at need all gaps close: the last token can be used.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int,
        layout: KVLayout = BY_TOKEN, *, max_tokens: int, max_context: int,
    ) -> None:  # fmt: skip
        """max_tokens: room of all slots together. max_context: that of the largest slot.

        Both are rounded up to whole blocks of the layout.

        Raises:
            OSError: the system refuses as much memory.
        """
        assert max_tokens >= max_context
        max_tokens, max_context = layout.rounded(max_tokens), layout.rounded(max_context)
        self._max_tokens = max_tokens
        self._layout = layout
        self._arena = Arena(num_layers, num_kv_heads, head_dim, layout, num_tokens=max_tokens)
        capacities = [MIN_CAPACITY]
        while capacities[0] < max_context:
            capacities.insert(0, 2 * capacities[0])
        self._doubling = [KVPool(c, layout, *self._arena.slots(c, 0), 0) for c in capacities[1:]]
        first_token = max_tokens % max_context
        slots = self._arena.slots(max_context, first_token)
        self._last = KVPool(max_context, layout, *slots, first_token, begin=slots[0].shape[1])
        self._pools = (*self._doubling, self._last)  # in the order of the arena
        self._rising = (*reversed(self._doubling), self._last)  # by capacity

    def num_bytes(self, num_tokens: int) -> int:
        """Of the keys and values of one sequence in all layers. Any thread."""
        return self._layout.rounded(num_tokens) * self._arena.bytes_per_token

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

    def _add(self, cache: KVCache, pool: KVPool) -> list[Copy]:
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

    def _remove(self, cache: KVCache) -> list[Copy]:
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

    def _make_room(self, growing: KVPool) -> list[Copy]:
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
