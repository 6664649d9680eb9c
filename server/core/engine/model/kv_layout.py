"""The layout of a slot's keys and values in memory. Each kind of attention has its own."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class KVLayout(NamedTuple):
    """The order of the keys and values of one head, whose positions are divided into blocks.

    dtype: of the numbers.
    block_size: positions in a block. A slot's capacity is a multiple of it, and whole blocks are
    copied.
    shapes: of keys and of values, for a capacity and D. The first dimension of the keys counts
    blocks.
    value_axis: the dimension of the values that counts blocks.
    by_token: turns keys and values, each (H_kv, *shape), into (H_kv, S, D) and (H_kv, D, S).
    laid_out: turns (..., S, D) and (..., D, S) into keys and values of whole blocks, (..., *shape).
    """

    dtype: torch.dtype
    block_size: int
    shapes: Callable[[int, int], tuple[Shape, Shape]]
    value_axis: int
    by_token: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    laid_out: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def rounded(self, num_tokens: int) -> int:
        """`num_tokens`, rounded up to whole blocks."""
        return self.num_blocks(num_tokens) * self.block_size


# Decode reads keys and values along their rows: PyTorch's matrix-vector products then run at the
# memory's speed.
BY_TOKEN = KVLayout(
    torch.float32,
    block_size=1,
    shapes=lambda capacity, head_dim: ((capacity, head_dim), (head_dim, capacity)),
    value_axis=1,
    by_token=lambda keys, values: (keys, values),
    laid_out=lambda keys, values: (keys, values),
)
