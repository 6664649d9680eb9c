"""Keys and values of earlier sequences, reused by those that begin with the same tokens.

Copying them takes about a hundredth of the time of computing them.
"""

import struct
from bisect import bisect, insort
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from server.core.engine.model.kv_cache import KVCache, KVPrefix


@dataclass(frozen=True, eq=False)
class _Entry:
    key: bytes
    prefix: KVPrefix
    is_pinned: bool
    adapter: str


_get_key = attrgetter("key")


class PrefixCache:
    """Bounded in bytes; evicts the least recently used entries first, pinned ones never.

    Entries are sorted by their tokens. The entry with the longest common prefix is then next to the
    query's place, so a lookup compares the query with few entries.
    Entries of one adapter are never found for another one, or for the base model ("").
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._num_pinned_bytes = 0
        # By adapter, then by number of layers and `is_pinned`. No unpinned entry is a prefix of
        # another in its list.
        self._lists: dict[str, dict[tuple[int, bool], list[_Entry]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self._unpinned: OrderedDict[_Entry, None] = OrderedDict()  # the least recently used first

    @property
    def num_bytes(self) -> int:
        """Memory of all entries."""
        return self._num_bytes

    def lookup(
        self, token_ids: Sequence[int], num_layers: int, *, adapter: str = ""
    ) -> KVPrefix | None:
        """The longest cached prefix in the first `num_layers` layers; must not be changed.

        It is always shorter than `token_ids`: at least one token must be computed to get logits.
        """
        key = _key(token_ids[:-1])
        best, longest = None, 0
        for entry in self._neighbours(key, adapter):
            length = _num_common(entry.key, key)
            if length > longest and entry.prefix.num_layers >= num_layers:
                best, longest = entry, length
        if best is None:
            return None
        self._use(best)
        return best.prefix.first(longest, num_layers)

    def store(
        self, token_ids: Sequence[int], cache: KVCache, num_layers: int, *,
        adapter: str = "", is_pinned: bool = False,
    ) -> None:  # fmt: skip
        """Copies the first tokens of `cache`, which are `token_ids`, into a new entry.

        num_layers: only the first layers have computed the tokens.
        Replaces unpinned entries that are a prefix of the tokens, unless they have more layers.
        If an entry of as many layers or more already begins with the tokens (a pinned one, for
        pinned tokens), only marks that entry as used. Pinned tokens are stored whatever their
        size, unpinned ones only if they fit beside the pinned entries.
        """
        prefix = cache.first(len(token_ids), num_layers)
        if not is_pinned and not self.has_room_for(prefix.num_bytes):
            return
        key = _key(token_ids)
        neighbours = self._neighbours(key, adapter)
        for entry in neighbours:
            is_as_deep = entry.prefix.num_layers >= num_layers
            if entry.key.startswith(key) and is_as_deep and (entry.is_pinned or not is_pinned):
                self._use(entry)
                return
        for entry in neighbours:
            is_deeper = entry.prefix.num_layers > num_layers
            if key.startswith(entry.key) and not is_deeper and not entry.is_pinned:
                self._remove(entry)
        while self._unpinned and self._num_bytes + prefix.num_bytes > self._max_bytes:
            self._remove(next(iter(self._unpinned)))
        self._add(_Entry(key, prefix.clone(), is_pinned, adapter))

    def pin(self, token_ids: Sequence[int], prefix: KVPrefix, *, adapter: str) -> None:
        """Adds a pinned entry for an adapter's virtual tokens."""
        self._add(_Entry(_key(token_ids), prefix, True, adapter))

    def has_room_for(self, num_bytes: int) -> bool:
        """Whether an entry of that size fits beside the pinned ones. Thread-safe."""
        return self._num_pinned_bytes + num_bytes <= self._max_bytes

    def _neighbours(self, key: bytes, adapter: str) -> list[_Entry]:
        """The entries directly before and after the key's place in each list.

        They include, for each list: the entry with the longest common prefix; an entry that begins
        with the key, if any; the only unpinned entry that is a prefix of the key, if any.
        """
        neighbours = []
        for entries in self._lists[adapter].values():
            place = bisect(entries, key, key=_get_key)
            neighbours += entries[max(place - 1, 0) : place + 1]
        return neighbours

    def _use(self, entry: _Entry) -> None:
        if not entry.is_pinned:
            self._unpinned.move_to_end(entry)

    def _add(self, entry: _Entry) -> None:
        entries = self._lists[entry.adapter][entry.prefix.num_layers, entry.is_pinned]
        insort(entries, entry, key=_get_key)
        self._num_bytes += entry.prefix.num_bytes
        if entry.is_pinned:
            self._num_pinned_bytes += entry.prefix.num_bytes
        else:
            self._unpinned[entry] = None

    def _remove(self, entry: _Entry) -> None:
        entries = self._lists[entry.adapter][entry.prefix.num_layers, False]
        del entries[bisect(entries, entry.key, key=_get_key) - 1]
        del self._unpinned[entry]
        self._num_bytes -= entry.prefix.num_bytes


def _key(token_ids: Sequence[int]) -> bytes:
    """Big-endian words of 4 bytes, which sort as the token ids do."""
    return struct.pack(f">{len(token_ids)}I", *token_ids)


def _num_common(a: bytes, b: bytes) -> int:
    """Length of the common prefix, in tokens."""
    length = min(len(a), len(b)) // 4
    differs = np.frombuffer(a, np.uint32, length) != np.frombuffer(b, np.uint32, length)
    return int(differs.argmax()) if differs.any() else length
