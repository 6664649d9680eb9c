"""Attention of all tokens of a step, run by run."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from server.core.engine.model.attention.branches import BranchRun
from server.core.engine.model.attention.decodes import DecodeRun, are_neighbours
from server.core.engine.model.attention.prompt import PromptRun
from server.core.engine.model.attention.segment import Segment
from server.core.engine.model.kv_layout import BY_TOKEN, KVLayout


class Run(Protocol):
    """Neighbouring tokens of a step that attend in one call."""

    rows: slice  # of the step's tokens

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        """heads: queries, already scaled, keys and values: (T, H + 2 H_kv, D).

        Stores the new keys and values. Returns (T, H D).
        """


class AttentionKind(NamedTuple):
    """One way to compute attention.

    layout: of the keys and values it reads.
    are_neighbours: whether the second of two segments can follow the first in one run.
    make_run: (row, segments) -> the run of such segments; row: its first among the step's tokens.
    """

    layout: KVLayout
    are_neighbours: Callable[[Segment, Segment], bool]
    make_run: Callable[[int, Sequence[Segment]], Run]


class StepAttention:
    """Attention of one step; the same for all layers.

    The segments must come in the order that `step_order` gives.
    """

    def __init__(self, kind: AttentionKind, segments: Sequence[Segment]) -> None:
        self._runs = list[Run]()
        begin = row = 0
        while begin < len(segments):
            end = begin + 1
            while end < len(segments) and kind.are_neighbours(segments[end - 1], segments[end]):
                end += 1
            self._runs.append(kind.make_run(row, segments[begin:end]))
            begin, row = end, self._runs[-1].rows.stop

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        """heads: see `Run`, (N, H + 2 H_kv, D). Returns (N, H D).

        N is smaller in layers that the last segments of the step do not reach.
        Does not change the caches' lengths: all layers write at the same positions.
        """
        mixed = []
        for run in self._runs:
            if run.rows.start >= len(heads):
                break
            mixed.append(run(layer, heads[run.rows]))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _make_run(row: int, segments: Sequence[Segment]) -> Run:
    """Only decodes have several segments."""
    if segments[0].is_decode:
        return DecodeRun(row, segments)
    [segment] = segments
    return BranchRun(row, segment) if segment.branches else PromptRun(row, segment)


# In PyTorch, for any processor.
TORCH_ATTENTION = AttentionKind(BY_TOKEN, are_neighbours, _make_run)
