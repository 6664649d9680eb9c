"""Attention of continuations that are scored after one prompt."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from server.core.engine.model.attention.segment import Segment, split_heads, tile_end
from server.core.engine.model.linear import ROWS

# Attention scores of a head that are held at once: 15 MB for 14 heads.
_MAX_SCORES = 2**18


class _Grid(NamedTuple):
    """B branches, each padded to P tokens by repeating its last one."""

    padded_rows: Tensor  # (B, P), rows of the run
    mask: Tensor  # (P, 1, P), True where a token must not attend within its branch
    filled: Tensor  # (n,), places in the flattened grid that are not padding
    rows: Tensor  # (n,), the run's rows in these places


class BranchRun:
    """Branches after S positions of a prompt, which are read in place.

    All rows are multiplied with the prompt's keys at once, and those of each branch with its own
    keys. One softmax covers both, as if each branch were alone after the prompt.
    A branch's P is the least power of two that holds it, and at least 4. So all sums depend only
    on the branch and its prompt, not on other rows of the step.
    """

    def __init__(self, row: int, segment: Segment) -> None:
        """row: where the run begins among the step's tokens."""
        self.rows = slice(row, row + len(segment.token_ids))
        self._num_kv_heads = segment.pool.num_kv_heads
        self._num_prompt = segment.positions[0]
        self._end = tile_end(self._num_prompt - 1, segment.cache.capacity)
        self._prompt = segment.pool.view(segment.cache.slot, self._end)
        self._grids = list(_grids(segment.branches, self._end))

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        """heads: (T, H + 2 H_kv, D). Returns (T, H D)."""
        queries, keys, values = split_heads(heads, self._num_kv_heads)
        mixed = torch.empty(len(queries), queries[0].numel())
        for grid in self._grids:
            padded = queries[grid.padded_rows], keys[grid.padded_rows], values[grid.padded_rows]
            attended = self._attend(layer, *padded, grid.mask)
            mixed[grid.rows] = attended.flatten(0, 1)[grid.filled]
        return mixed

    def _attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor
    ) -> Tensor:
        """queries: (B, P, H, D). keys, values: (B, P, H_kv, D). Returns (B, P, H D)."""
        num, length, num_kv_heads, head_dim = keys.shape
        prompt_keys, prompt_values = self._prompt.layer(layer).by_token()
        # The G query heads of a token that share a key head are consecutive rows.
        grouped = queries.view(num, length, num_kv_heads, -1, head_dim)
        rows = grouped.permute(2, 0, 1, 3, 4).contiguous()
        own_keys, own_values = (
            x.permute(2, 0, 1, 3).reshape(-1, length, head_dim) for x in (keys, values)
        )
        prompt_scores = torch.bmm(rows.flatten(1, 3), prompt_keys.transpose(1, 2))
        prompt_scores[..., self._num_prompt :] = -torch.inf
        own_scores = torch.bmm(rows.flatten(0, 1).flatten(1, 2), own_keys.transpose(1, 2))
        own_scores.view(-1, *rows.shape[2:4], length).masked_fill_(mask, -torch.inf)
        scores = torch.cat((prompt_scores, own_scores.view(num_kv_heads, -1, length)), -1)
        weights = scores.softmax(-1)
        mixed = torch.bmm(weights[..., : self._end], prompt_values.transpose(1, 2))
        own_weights = weights[..., self._end :].reshape(own_scores.shape)
        mixed += torch.bmm(own_weights, own_values).view(mixed.shape)
        return mixed.view(rows.shape).permute(1, 2, 0, 3, 4).reshape(num, length, -1)


def _grids(lengths: tuple[int, ...], end: int) -> Iterator[_Grid]:
    """end: S, positions of the prompt."""
    by_padded = defaultdict[int, list[tuple[int, int]]](list)
    for begin, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
        by_padded[max(ROWS, 1 << (length - 1).bit_length())].append((begin, length))
    for padded, branches in by_padded.items():
        mask = torch.ones(padded, padded, dtype=torch.bool).triu(1)[:, None]
        size = max(1, _MAX_SCORES // (padded * end))
        for first in range(0, len(branches), size):
            begins, num_tokens = torch.tensor(branches[first : first + size]).T[:, :, None]
            places = torch.arange(padded)
            padded_rows = begins + torch.minimum(places, num_tokens - 1)
            filled = (places < num_tokens).flatten().nonzero()[:, 0]
            yield _Grid(padded_rows, mask, filled, padded_rows.flatten()[filled])
