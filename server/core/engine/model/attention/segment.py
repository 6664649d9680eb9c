"""New tokens of one sequence in a step, and how many positions they attend to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.core.engine.model.kv_cache import KVCache, KVPool
from server.core.engine.model.linear import ROWS
from server.core.engine.model.lora import Lora

# A token attends to all positions up to the end of its tile of this many; those after it are
# masked. So the number of positions depends only on the token's own position, and its sums are
# bit-identical in any batch.
TILE = 128


@dataclass(frozen=True)
class Segment:
    """T new tokens of one sequence; its KV cache has room for those it keeps.

    is_decode: whether its only token was sampled. Neighbouring decodes are computed together.
    branches: if the tokens are continuations to score, the length of each. A continuation attends
    to the tokens in the cache and to itself, and is not kept.
    layers: hidden states are returned after these, ascending from 1. The segment leaves the
    forward pass after the last of them. None means the model's last layer.
    lora: computed beside the model's matrices.
    """

    token_ids: Sequence[int]
    positions: Sequence[int]
    cache: KVCache
    is_decode: bool = False
    branches: tuple[int, ...] = ()
    layers: tuple[int, ...] | None = None
    lora: Lora | None = None

    @property
    def depth(self) -> float:
        """Number of layers that compute it; infinite: all."""
        return self.layers[-1] if self.layers else math.inf

    @property
    def pool(self) -> KVPool:
        """The pool of its cache."""
        assert self.cache.pool is not None
        return self.cache.pool

    @property
    def num_kept(self) -> int:
        """Tokens that the step adds to the cache."""
        return 0 if self.branches else len(self.token_ids)


def step_order(segments: Sequence[Segment]) -> list[int]:
    """Indices of the segments in an order that makes neighbours in memory neighbours in the step.

    Segments that leave the forward pass early come last, the first to leave at the very end.
    Continuations come after their prompt.
    """

    def key(index: int) -> tuple[float, bool, int, int, bool]:
        segment = segments[index]
        cache = segment.cache
        kind = not segment.is_decode, cache.capacity, cache.slot, bool(segment.branches)
        return -segment.depth, *kind

    return sorted(range(len(segments)), key=key)


def tile_end(position: int, capacity: int) -> int:
    """Number of positions that the token at `position` attends to, masked ones included."""
    return min((position // TILE + 1) * TILE, capacity)


def rounded(num_rows: int) -> int:
    """`num_rows`, rounded up to a multiple of `ROWS`."""
    return -(-num_rows // ROWS) * ROWS


def split_heads(heads: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(T, H + 2 H_kv, D) -> queries (T, H, D), keys and values (T, H_kv, D)."""
    sizes = [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads]
    queries, keys, values = torch.split(heads, sizes, dim=1)
    return queries, keys, values
