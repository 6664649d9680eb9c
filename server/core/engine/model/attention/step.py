"""Where all tokens of a step are kept, and what they attend to."""

from collections.abc import Sequence

import torch
from torch import Tensor

from server.core.engine.model.attention.branches import BranchRun
from server.core.engine.model.attention.decodes import DecodeRun, are_neighbours
from server.core.engine.model.attention.prompt import PromptRun
from server.core.engine.model.attention.segment import Segment


class StepAttention:
    """Attention of one step; the same for all layers.

    The segments must come in the order that `step_order` gives.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._runs = list[BranchRun | DecodeRun | PromptRun]()
        begin = row = 0
        while begin < len(segments):
            end = begin + 1
            while end < len(segments) and are_neighbours(segments[end - 1], segments[end]):
                end += 1
            self._runs.append(_run(row, segments[begin:end]))
            begin, row = end, self._runs[-1].rows.stop

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Stores the new keys and values and mixes the values.

        queries: (N, H, D), already scaled. keys, values: (N, H_kv, D). Returns (N, H D).
        N is smaller in layers that the last segments of the step do not reach.
        Does not change the caches' lengths: all layers write at the same place.
        """
        mixed = []
        for run in self._runs:
            if run.rows.start >= len(queries):
                break
            mixed.append(run(layer, queries[run.rows], keys[run.rows], values[run.rows]))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _run(row: int, segments: Sequence[Segment]) -> BranchRun | DecodeRun | PromptRun:
    """The run that begins at a row of the step. Only decodes have several segments."""
    if segments[0].is_decode:
        return DecodeRun(row, segments)
    [segment] = segments
    return BranchRun(row, segment) if segment.branches else PromptRun(row, segment)
