"""Keys and values of computed tokens, and the slots that hold them.

Sequences of similar length are neighbours in one tensor, so that a decode step computes their
attention in one call.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from server.core.engine.model.kv_layout import BY_TOKEN, KVLayout


@dataclass(eq=False)
class KVCache:
    """One sequence's slot in the KV memory. `length` tokens are computed."""

    length: int = 0
    pool: "KVPool | None" = field(default=None, repr=False)
    slot: int = 0

    @property
    def capacity(self) -> int:
        """Tokens that the slot has room for; 0 without a slot."""
        return self.pool.capacity if self.pool else 0

    def first(self, length: int, num_layers: int) -> "KVPrefix":
        """A view of its first tokens in the first layers."""
        assert self.pool is not None
        assert 0 < length <= self.length
        return self.pool.view(self.slot, length).first(length, num_layers)


@dataclass(frozen=True)
class KVPrefix:
    """Computed tokens of one sequence, in whole blocks of their layout.

    keys, values: (layers, H_kv, *shape); see `KVLayout.shapes`.
    """

    keys: Tensor
    values: Tensor
    length: int
    layout: KVLayout = BY_TOKEN

    @property
    def num_layers(self) -> int:
        return self.keys.shape[0]

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def first(self, length: int, num_layers: int | None = None) -> "KVPrefix":
        """A view of its first tokens in the first layers (None: in all)."""
        num_blocks = self.layout.num_blocks(length)
        keys = self.keys[:num_layers, :, :num_blocks]
        values = self.values[:num_layers].narrow(2 + self.layout.value_axis, 0, num_blocks)
        return KVPrefix(keys, values, length, self.layout)

    def layer(self, index: int) -> "KVPrefix":
        """A view of one layer."""
        layer = slice(index, index + 1)
        return KVPrefix(self.keys[layer], self.values[layer], self.length, self.layout)

    def by_token(self) -> tuple[Tensor, Tensor]:
        """Keys and values of its only layer in float32: (H_kv, length, D) and (H_kv, D, length)."""
        [keys], [values] = self.keys, self.values
        keys, values = self.layout.by_token(keys, values)
        return keys[:, : self.length].float(), values[..., : self.length].float()

    def clone(self) -> "KVPrefix":
        """A copy in memory of its own, in the same layout and no larger than needed."""
        return KVPrefix(self.keys.clone(), self.values.clone(), self.length, self.layout)

    def copy_(self, other: "KVPrefix") -> None:
        """Overwrites this prefix with the other one."""
        self.keys.copy_(other.keys)
        self.values.copy_(other.values)


class Copy(NamedTuple):
    """A copy of a sequence's tokens from its slot to another one, still to be made."""

    source: KVPrefix
    target: KVPrefix


@dataclass(eq=False)
class KVPool:
    """Slots of one capacity; `caches` use those from `begin` on, in order and without gaps.

    keys, values: (layers, slots, H_kv, *shape); see `KVLayout.shapes`. Both are views of the whole
    arena; other pools may use the memory of slots that this one does not use.
    """

    capacity: int
    layout: KVLayout
    keys: Tensor
    values: Tensor
    first_token: int  # of slot 0, in the arena
    begin: int = 0
    caches: list[KVCache] = field(default_factory=list)

    @property
    def num_kv_heads(self) -> int:
        return self.keys.shape[2]

    @property
    def num_tokens(self) -> int:
        """Capacity of its slots in use, in tokens."""
        return len(self.caches) * self.capacity

    @property
    def tokens(self) -> range:
        """The arena's tokens that its slots in use occupy."""
        first = self.first_token_of(self.begin)
        return range(first, first + self.num_tokens)

    def first_token_of(self, slot: int) -> int:
        """The first token of the slot, in the arena."""
        return self.first_token + slot * self.capacity

    def view(self, slot: int, length: int) -> KVPrefix:
        """A view of the first tokens of a slot."""
        whole = KVPrefix(self.keys[:, slot], self.values[:, slot], self.capacity, self.layout)
        return whole.first(length)

    def move(self, cache: KVCache, slot: int) -> Copy:
        """Assigns another slot to the cache; the caller must make the copy."""
        copy = Copy(self.view(cache.slot, cache.length), self.view(slot, cache.length))
        cache.slot = slot
        return copy

    def shift(self, begin: int) -> list[Copy]:
        """Uses the slots from `begin` on instead; the caller must make the copies, in order.

        A cache whose slot stays in use keeps it.
        """
        distance, self.begin = begin - self.begin, begin
        num = len(self.caches)
        # A shift to the right moves the first caches after the last one; to the left, the reverse.
        split = min(distance, num) if distance > 0 else max(num + distance, 0)
        front, back = self.caches[:split], self.caches[split:]
        self.caches = back + front
        if distance > 0:
            return [self.move(cache, cache.slot + max(distance, num)) for cache in front]
        return [self.move(cache, cache.slot + min(distance, -num)) for cache in back]
