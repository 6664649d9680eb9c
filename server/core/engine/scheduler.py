"""Decides what the next step computes of the admitted sequences. Knows token counts."""

from collections import Counter
from dataclasses import dataclass

from server.core.engine.admission import Admission, Allocator
from server.core.engine.sequence import Sequence
from server.core.engine.work import Work

# A step that several requests share has max_rows // SHARED_PART rows, so that their streams pause
# only briefly. A row then costs 1.8 ms instead of 1.4 (32 and 256 rows of a 0.5B model).
SHARED_PART = 8
# While another request's prompt waits, a shared step decodes max_shared_rows // DECODING_PART
# sequences, or one of each request if these are more.
DECODING_PART = 4
# Minimum rows of a prompt that takes part in a shared step: attention copies all its values anyway.
MIN_ROWS = 4
# Requests are ordered by num_rows // ROWS_PER_TURN, then by arrival.
ROWS_PER_TURN = 64
# Every 4th step begins with the request that has gone longest without a row.
LONGEST_WAIT_STRIDE = 4
# Minimum rows of a prompt in a step of one request alone, however long the prompt is.
MIN_ROWS_ALONE = 192
# Attention to this many positions takes as long as the rest of a row's forward (0.5B, int8).
POSITIONS_PER_ROW = 2048


@dataclass(frozen=True)
class ScheduledChunk:
    """The part of a sequence that a step computes: tokens, then continuations after its prompt."""

    sequence: Sequence
    num_tokens: int
    num_continuations: int = 0

    @property
    def continuations(self) -> list[list[int]]:
        """The continuations that this step scores."""
        begin = self.sequence.num_scored
        return self.sequence.continuations[begin : begin + self.num_continuations]

    @property
    def num_rows(self) -> int:
        """Rows of the forward pass; the last token of a continuation needs none."""
        return self.num_tokens + sum(len(ids) - 1 for ids in self.continuations)

    @property
    def is_prompt_complete(self) -> bool:
        """Whether the sequence has no token left to compute after this chunk."""
        return self.num_tokens == self.sequence.num_uncomputed

    @property
    def is_last(self) -> bool:
        """Whether the sequence has nothing left to compute, so it gets a result."""
        num_scored = self.sequence.num_scored + self.num_continuations
        return self.is_prompt_complete and num_scored == len(self.sequence.continuations)

    def advance(self) -> None:
        """Records that the chunk was computed. Its other properties are invalid afterwards."""
        sequence = self.sequence
        sequence.work.num_rows += self.num_rows
        sequence.num_computed += self.num_tokens
        sequence.num_scored += self.num_continuations


class Scheduler:
    """Shares every step among the requests that have work; sequences join and leave at any step.

    A step has at most `max_rows` rows: a token of each decoding sequence, and tokens of prompts
    and continuations. One request alone may use them all. A continuation with more rows is still
    computed in one step.
    """

    def __init__(self, max_num_seqs: int, max_rows: int, allocator: Allocator) -> None:
        """max_num_seqs: sequences that decode in one step, and requests that run at once."""
        assert max_num_seqs > 0 and max_rows > 1
        self.admission = Admission(max_num_seqs, allocator)
        self.max_shared_rows = max(2, max_rows // SHARED_PART)
        self._max_num_seqs, self._max_rows = max_num_seqs, max_rows
        self._num_steps = 0

    def schedule(self) -> list[ScheduledChunk]:
        """The chunks of the next step; admits waiting sequences while there is room."""
        self.admission.admit_waiting(self._num_steps)
        self._num_steps += 1
        chunks: list[ScheduledChunk] = []
        for sequence in self._decoding():
            if self.admission.make_room(sequence):
                chunks.append(ScheduledChunk(sequence, 1))
        is_shared = len({sequence.work for sequence in self.admission.running}) > 1
        max_rows = self._num_prompt_rows(len(chunks), is_shared)
        # Rows that the first prompt gets whatever their cost; later prompts get what is left.
        num_granted = min(max_rows, MIN_ROWS if is_shared else MIN_ROWS_ALONE)
        min_rows = num_granted if is_shared else 1
        rows_left = float(max_rows)
        for sequence in self._prefilling():
            # A row costs more the more positions it attends to.
            cost = 1 + sequence.num_computed / POSITIONS_PER_ROW
            num_rows = max(round(rows_left / cost), num_granted)
            if num_rows < min(min_rows, max(sequence.num_uncomputed, 1)):
                continue
            chunk = _chunk(sequence, num_rows)
            chunks.append(chunk)
            rows_left -= chunk.num_rows * cost
            num_granted = 0
        for chunk in chunks:
            chunk.sequence.last_step = chunk.sequence.work.last_step = self._num_steps
        # Making room for a sequence may have suspended one that was scheduled before it.
        return [chunk for chunk in chunks if chunk.sequence in self.admission.running]

    def _decoding(self) -> list[Sequence]:
        """The sequences that decode in this step; if not all can, one of each request is first."""
        decoding = [sequence for sequence in self.admission.running if sequence.is_decoding]
        limit = min(
            self._max_num_seqs, self._max_rows - (len(decoding) < len(self.admission.running))
        )
        works = {sequence.work for sequence in decoding}
        if works != {sequence.work for sequence in self.admission.running}:
            limit = min(limit, max(len(works), self.max_shared_rows // DECODING_PART))
        if len(decoding) <= limit:
            return decoding
        decoding.sort(key=lambda sequence: (sequence.last_step, len(sequence.completion_ids)))
        rank_in_work, counts = {}, Counter[Work]()
        for sequence in decoding:
            rank_in_work[sequence] = counts[sequence.work]
            counts[sequence.work] += 1
        return sorted(decoding, key=rank_in_work.__getitem__)[:limit]

    def _num_prompt_rows(self, num_decoding: int, is_shared: bool) -> int:
        if not is_shared:
            return self._max_rows - num_decoding
        min_rows = max(1, self.max_shared_rows // 2)
        num_rows = max(self.max_shared_rows - num_decoding, min_rows)
        return min(num_rows, self._max_rows - num_decoding)

    def _prefilling(self) -> list[Sequence]:
        """The running sequences that do not decode, in the order of their requests' turns."""
        prefilling = [sequence for sequence in self.admission.running if not sequence.is_decoding]
        if self._num_steps % LONGEST_WAIT_STRIDE == 0:
            return sorted(prefilling, key=lambda s: (s.work.last_step, s.work.arrived_at))
        return sorted(
            prefilling, key=lambda s: (s.work.num_rows // ROWS_PER_TURN, s.work.arrived_at)
        )


def _chunk(sequence: Sequence, max_rows: int) -> ScheduledChunk:
    """As much of the sequence as fits into `max_rows`; a continuation is never divided."""
    num_tokens = min(sequence.num_uncomputed, max_rows)
    num_continuations = 0
    if num_tokens == sequence.num_uncomputed:
        rows_left = max_rows - num_tokens
        for ids in sequence.continuations[sequence.num_scored :]:
            rows_left -= len(ids) - 1
            # A continuation that is longer than the step is computed alone.
            if rows_left < 0 and num_tokens + num_continuations:
                break
            num_continuations += 1
    return ScheduledChunk(sequence, num_tokens, num_continuations)
