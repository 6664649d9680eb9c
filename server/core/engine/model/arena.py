"""Memory for keys and values, reserved once. Knows tokens and slots, not sequences."""

import mmap

import torch
from torch import Tensor

from server.core.engine.model.kv_layout import BY_TOKEN, KVLayout


class Arena:
    """Keys and values of a fixed number of tokens; a page takes memory once it is written.

    A slot is the memory of `capacity` consecutive tokens in every layer, zero at first.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int,
        layout: KVLayout = BY_TOKEN, *, num_tokens: int,
    ) -> None:  # fmt: skip
        """Reserves all address space at once.

        Raises:
            OSError: the system refuses it.
        """
        self._num_layers, self._num_kv_heads, self._head_dim = num_layers, num_kv_heads, head_dim
        self._num_tokens = num_tokens
        self._layout = layout
        self._token_bytes = layout.dtype.itemsize * num_kv_heads * head_dim  # of one layer's keys
        self._maps = [_reserve(num_layers * num_tokens * self._token_bytes) for _ in range(2)]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return 2 * self._num_layers * self._token_bytes

    def slots(self, capacity: int, first_token: int) -> tuple[Tensor, Tensor]:
        """Divides the memory from `first_token` on into as many slots as fit.

        Returns views of keys and values, each (layers, slots, H_kv, *shape); see `KVLayout.shapes`.
        """
        num_slots = (self._num_tokens - first_token) // capacity
        size = self._num_kv_heads * self._head_dim
        used = slice(first_token * size, (first_token + num_slots * capacity) * size)
        keys, values = (
            torch.frombuffer(pages, dtype=self._layout.dtype).view(self._num_layers, -1)[:, used]
            for pages in self._maps
        )
        first = (self._num_layers, num_slots, self._num_kv_heads)
        key_shape, value_shape = self._layout.shapes(capacity, self._head_dim)
        return keys.view(*first, *key_shape), values.view(*first, *value_shape)

    def give_back(self, begin: int, end: int) -> None:
        """Returns the whole pages of these tokens to the system; their content is lost."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        layer_bytes = self._num_tokens * self._token_bytes
        for layer in range(self._num_layers):
            first = layer * layer_bytes + begin * self._token_bytes
            last = layer * layer_bytes + end * self._token_bytes
            start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
            num_bytes = last // mmap.PAGESIZE * mmap.PAGESIZE - start
            if num_bytes > 0:
                for pages in self._maps:
                    pages.madvise(mmap.MADV_DONTNEED, start, num_bytes)


def _reserve(num_bytes: int) -> mmap.mmap:
    try:
        # The default is shared memory, which MADV_DONTNEED would not return.
        if hasattr(mmap, "MAP_PRIVATE"):
            return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return mmap.mmap(-1, num_bytes)
    except (OSError, OverflowError) as error:
        size_mib = num_bytes / 2**20
        raise OSError(
            f"cannot reserve twice {size_mib:.0f} MiB for keys and values: {error}"
        ) from error
