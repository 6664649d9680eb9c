"""Keys and values of the tokens one sequence has computed."""

import torch
from torch import Tensor

MIN_CAPACITY = 128


class KVCache:
    """One buffer for all layers, grown by doubling. K and V: (layers, H_kv, capacity, D)."""

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype):
        self.length = 0
        self._keys = torch.empty(num_layers, num_kv_heads, 0, head_dim, dtype=dtype)
        self._values = torch.empty_like(self._keys)

    @property
    def num_bytes(self) -> int:
        """Memory held, used or not."""
        return self._keys.nbytes + self._values.nbytes

    def reserve(self, num_tokens: int) -> None:
        """Makes room for `num_tokens` behind `length`."""
        needed, capacity = self.length + num_tokens, self._keys.shape[2]
        if needed <= capacity:
            return
        while capacity < needed:
            capacity = max(MIN_CAPACITY, 2 * capacity)
        self._keys, self._values = self._resized(self.length, capacity)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts (H_kv, T, D) behind `length` and returns all of it: (H_kv, length + T, D).

        Does not change `length`: all layers write at the same place, then the caller moves it.
        """
        end = self.length + keys.shape[1]
        self._keys[layer, :, self.length : end] = keys
        self._values[layer, :, self.length : end] = values
        return self._keys[layer, :, :end], self._values[layer, :, :end]

    def copy(self, length: int) -> "KVCache":
        """A cache of its own that holds the first `length` tokens and not a byte more."""
        copy = object.__new__(KVCache)
        copy.length = length
        copy._keys, copy._values = self._resized(length, length)
        return copy

    def _resized(self, length: int, capacity: int) -> tuple[Tensor, Tensor]:
        """Copies of both buffers with another capacity; the first `length` tokens are kept."""
        resized = []
        for old in (self._keys, self._values):
            layers, heads, _, head_dim = old.shape
            new = old.new_empty(layers, heads, capacity, head_dim)
            new[:, :, :length] = old[:, :, :length]
            resized.append(new)
        return resized[0], resized[1]
