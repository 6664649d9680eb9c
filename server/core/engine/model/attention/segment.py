"""New tokens of one sequence in a step, and how many positions they attend to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.core.engine.model.kv_cache import KVCache, KVPool
from server.core.engine.model.linear import ROWS
from server.core.engine.model.lora import Lora

# A token attends to all positions up to the end of its tile of this many; those behind it are
# masked. So the number of positions depends on where the token stands, and on nothing that it is
# computed with, and its sums are equal to the last bit.
TILE = 128


@dataclass(frozen=True)
class Segment:
    """New tokens of one sequence, T of them; its KV cache has room for those it keeps.

    is_decode: whether its only token was sampled. It is then computed together with others'.
    branches: if the tokens are continuations to score, the length of each. A continuation attends
    to the tokens in the cache and to itself, and is not kept.
    layers: those after which its hidden states are wanted, rising from 1. The segment leaves
    the forward after the last of them. None means the model's last layer.
    lora: what is computed beside the model's matrices; None: nothing.
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
        """How many layers it passes; infinite: all of them."""
        return self.layers[-1] if self.layers else math.inf

    @property
    def pool(self) -> KVPool:
        """Where its cache is."""
        assert self.cache.pool is not None
        return self.cache.pool

    @property
    def num_kept(self) -> int:
        """Tokens by which the cache is longer after the step."""
        return 0 if self.branches else len(self.token_ids)


def step_order(segments: Sequence[Segment]) -> list[int]:
    """The order in which neighbours in memory are neighbours in the step, too.

    Segments that leave the forward early come last, the first to leave at the very end.
    Continuations come behind the prompt that they continue.
    """

    def key(index: int) -> tuple[float, bool, int, int, bool]:
        segment = segments[index]
        cache = segment.cache
        kind = not segment.is_decode, cache.capacity, cache.slot, bool(segment.branches)
        return -segment.depth, *kind

    return sorted(range(len(segments)), key=key)


def tile_end(position: int, capacity: int) -> int:
    """Positions that the token there attends to, the masked ones included."""
    return min((position // TILE + 1) * TILE, capacity)


def rounded(num_rows: int) -> int:
    """The number of rows with which a product is computed."""
    return -(-num_rows // ROWS) * ROWS


def split_heads(heads: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(T, H + 2 H_kv, D) -> queries (T, H, D), keys and values (T, H_kv, D)."""
    sizes = [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads]
    queries, keys, values = torch.split(heads, sizes, dim=1)
    return queries, keys, values
