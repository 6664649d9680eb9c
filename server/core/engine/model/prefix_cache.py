"""Keys and values of earlier sequences, for those that begin the same way.

Reusing them is a copy of memory, about a hundredth of the time of computing them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.core.engine.model.kv_cache import KVCache, KVPrefix


@dataclass(frozen=True, eq=False)
class _Entry:
    token_ids: Tensor  # (S,)
    prefix: KVPrefix
    is_pinned: bool


class PrefixCache:
    """Bounded in bytes; the least recently used entries go first, pinned ones never."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: list[_Entry] = []  # the least recently used first

    @property
    def num_bytes(self) -> int:
        """Memory of all entries."""
        return sum(entry.prefix.num_bytes for entry in self._entries)

    def lookup(self, token_ids: Sequence[int], num_layers: int) -> KVPrefix | None:
        """The longest prefix known in the first `num_layers` layers; not to be changed.

        It is always shorter than `token_ids`: one token at least stays to be computed, or there
        would be no logits.
        """
        wanted = torch.tensor(token_ids[:-1])
        lengths = [
            _num_common(entry.token_ids, wanted) if entry.prefix.num_layers >= num_layers else 0
            for entry in self._entries
        ]
        if not lengths or (longest := max(lengths)) == 0:
            return None
        entry = self._entries.pop(lengths.index(longest))
        self._entries.append(entry)
        return entry.prefix.first(longest, num_layers)

    def store(
        self, token_ids: Sequence[int], cache: KVCache, num_layers: int, *, is_pinned: bool = False
    ) -> None:
        """Remembers the tokens, which are the first of `cache`; it is copied, not kept.

        num_layers: the first layers, which alone have computed the tokens.
        Entries that the new one begins with are replaced by it, unless they have more layers.
        What is larger than all there is room for is not remembered, and takes no other's place.
        """
        prefix = cache.first(len(token_ids), num_layers)
        if not is_pinned and not self.has_room_for(prefix.num_bytes):
            return
        new = torch.tensor(token_ids)
        common = [_num_common(entry.token_ids, new) for entry in self._entries]
        for entry, length in zip(self._entries, common, strict=True):
            is_as_deep = entry.prefix.num_layers >= num_layers
            if length == len(new) and is_as_deep and (entry.is_pinned or not is_pinned):
                return  # this one begins with all of it
        self._entries = [
            entry
            for entry, length in zip(self._entries, common, strict=True)
            if entry.is_pinned
            or length < len(entry.token_ids)
            or entry.prefix.num_layers > num_layers
        ]
        self._evict(prefix.num_bytes)
        self._entries.append(_Entry(new, prefix.clone(), is_pinned))

    def has_room_for(self, num_bytes: int) -> bool:
        """Whether an entry of that size is remembered, if need be in place of all but pinned ones.

        Any thread.
        """
        pinned = sum(entry.prefix.num_bytes for entry in self._entries if entry.is_pinned)
        return pinned + num_bytes <= self._max_bytes

    def _evict(self, num_bytes: int) -> None:
        """Makes room for as much."""
        surplus = self.num_bytes + num_bytes - self._max_bytes
        kept = []
        for entry in self._entries:
            if surplus > 0 and not entry.is_pinned:
                surplus -= entry.prefix.num_bytes
            else:
                kept.append(entry)
        self._entries = kept


def _num_common(a: Tensor, b: Tensor) -> int:
    """Length of the common prefix."""
    length = min(len(a), len(b))
    differs = (a[:length] != b[:length]).nonzero()
    return int(differs[0]) if len(differs) else length
