"""Keys and values of the tokens one sequence has computed."""

import torch
from torch import Tensor

INITIAL_CAPACITY = 128


class KVCache:
    """One buffer per layer, grown by doubling. K and V: (layers, H_kv, capacity, D)."""

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype):
        self.length = 0
        self._shape = (num_layers, num_kv_heads, head_dim)
        self._keys = self._new(0, dtype)
        self._values = self._new(0, dtype)

    def reserve(self, num_tokens: int) -> None:
        """Makes room for `num_tokens` behind `length`."""
        needed, capacity = self.length + num_tokens, self._keys.shape[2]
        if needed <= capacity:
            return
        while capacity < needed:
            capacity = max(INITIAL_CAPACITY, 2 * capacity)
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            new = self._new(capacity, old.dtype)
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts (H_kv, T, D) behind `length` and returns all of it: (H_kv, length + T, D).

        Does not change `length`: all layers write at the same place, then the caller moves it.
        """
        end = self.length + keys.shape[1]
        self._keys[layer, :, self.length : end] = keys
        self._values[layer, :, self.length : end] = values
        return self._keys[layer, :, :end], self._values[layer, :, :end]

    def _new(self, capacity: int, dtype: torch.dtype) -> Tensor:
        num_layers, num_kv_heads, head_dim = self._shape
        return torch.empty(num_layers, num_kv_heads, capacity, head_dim, dtype=dtype)
