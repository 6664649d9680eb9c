"""Allocates slots for the keys and values of running sequences, all in one arena.

All memory is reserved at the start; a move allocates no more than one layer of one sequence.
"""

from collections.abc import Collection

from server.core.engine.model.arena import Arena
from server.core.engine.model.kv_cache import Copy, KVCache, KVPool, KVPrefix
from server.core.engine.model.kv_layout import BY_TOKEN, KVLayout

MIN_CAPACITY = 128


class KVMemory:
    """Allocates slots to sequences; a sequence that outgrows its slot moves to a larger one.

    The pools are in the arena by capacity, the largest first, with gaps where slots were freed.
    The slots of max_context tokens are at the arena's end, each new one before those in use.
    Every other capacity is a multiple of all smaller ones. So a gap is a whole number of slots of
    the pool after it, and that pool shifts by moving slots from one of its ends to the other.
    No copy overlaps its source, and all gaps can close: the arena can be used to its last token.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int,
        layout: KVLayout = BY_TOKEN, *, max_tokens: int, max_context: int,
    ) -> None:  # fmt: skip
        """max_tokens: capacity of all slots together. max_context: of the largest slot.

        Both are rounded up to whole blocks of the layout.

        Raises:
            OSError: the system refuses the memory.
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
        self._ascending = (*reversed(self._doubling), self._last)  # by capacity

    def num_bytes(self, num_tokens: int) -> int:
        """Bytes of a sequence's keys and values in all layers. Thread-safe."""
        return self._layout.rounded(num_tokens) * self._arena.bytes_per_token

    @property
    def num_tokens(self) -> int:
        """Capacity of all slots in use, filled or not. Thread-safe."""
        return sum(pool.num_tokens for pool in self._pools)

    @property
    def num_sequences(self) -> int:
        """Slots in use."""
        return sum(len(pool.caches) for pool in self._pools)

    def reserve(self, cache: KVCache, num_tokens: int) -> bool:
        """Makes room for `num_tokens` more than the cache's length; False if memory is short."""
        needed = cache.length + num_tokens
        if needed <= cache.capacity:
            return True
        pool = next(p for p in self._ascending if p.capacity >= needed)
        if self.num_tokens - cache.capacity + pool.capacity > self._max_tokens:
            return False
        if cache.pool is None:
            for source, target in self._add(cache, pool):
                target.copy_(source)
        else:
            self._replace(cache, pool)
        return True

    def fits(self, num_tokens: int, freed: Collection[KVCache]) -> bool:
        """Whether another sequence of `num_tokens` would fit if these caches were freed."""
        capacity = next(p.capacity for p in self._ascending if p.capacity >= num_tokens)
        num_used = self.num_tokens - sum(cache.capacity for cache in freed)
        return num_used + capacity <= self._max_tokens

    def fill(self, cache: KVCache, prefix: KVPrefix) -> None:
        """Copies the prefix to an empty cache, which has room for it.

        Layers that the prefix does not have stay as they were.
        """
        assert cache.pool is not None
        slot = cache.pool.view(cache.slot, prefix.length)
        slot.first(prefix.length, prefix.num_layers).copy_(prefix)
        cache.length = prefix.length

    def free(self, cache: KVCache, *, is_sound: bool = True) -> None:
        """Frees the slot; no effect without one.

        is_sound: whether its content is finite; if not, it is cleared. The content stays at the
        next sequence's masked positions, where neither -inf nor a weight of 0 removes a NaN.
        """
        if cache.pool is not None:
            if not is_sound:
                cache.pool.keys[:, cache.slot] = 0
                cache.pool.values[:, cache.slot] = 0
            for source, target in self._remove(cache):
                target.copy_(source)
        cache.pool, cache.slot, cache.length = None, 0, 0

    def rest(self) -> None:
        """Returns the memory of free slots to the system."""
        begin = 0
        for pool in self._pools:
            if pool.caches:
                self._arena.give_back(begin, pool.tokens.start)
                begin = pool.tokens.stop
        self._arena.give_back(begin, self._max_tokens)

    def _replace(self, cache: KVCache, pool: KVPool) -> None:
        """Moves the cache to a slot of the pool, which may use the memory of the old slot.

        The two slots may overlap, so each layer is saved before anything in it moves.
        """
        assert cache.pool is not None
        old = cache.pool.view(cache.slot, cache.length)
        saved = old.layer(0).clone()  # first, as this may fail
        copies = self._remove(cache) + self._add(cache, pool)
        new = pool.view(cache.slot, cache.length)
        for layer in range(old.num_layers):
            saved.copy_(old.layer(layer))
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
        """Moves the pool's outermost cache to the freed slot, so that no gap is left."""
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
        """Shifts pools, no further than needed, to make room for another slot of `growing`.

        In this order, no copy overwrites the source of a later one.
        """
        *sizes, last = [p.num_tokens + p.capacity * (p is growing) for p in self._pools]
        num_free = self._max_tokens - last - sum(sizes)
        assert num_free >= 0
        shifts = []
        end = num_used = 0  # of the pools so far: their end in the arena, and their tokens
        for pool, size in zip(self._doubling, sizes, strict=True):
            latest = num_used + num_free  # the pools after this one must fit
            begin = max(end // pool.capacity, min(pool.begin, latest // pool.capacity))
            shifts.append((pool, begin))
            end = begin * pool.capacity + size
            num_used += size
        to_left = [(pool, begin) for pool, begin in shifts if begin < pool.begin]
        to_right = [(pool, begin) for pool, begin in shifts if begin > pool.begin]
        return [
            copy for pool, begin in (*to_left, *reversed(to_right)) for copy in pool.shift(begin)
        ]
