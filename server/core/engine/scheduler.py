"""Decides what the next step computes of the sequences that hold memory. Knows token counts."""

from collections import Counter
from dataclasses import dataclass

from server.core.engine.admission import Admission, Allocator
from server.core.engine.sequence import Sequence
from server.core.engine.work import Work

# A step that several requests share has max_rows // SHARED_PART rows, so that its streams pause
# briefly. A row then costs 1.8 ms in place of 1.4 (32 and 256 rows of a 0.5B model).
SHARED_PART = 8
# While another request's prompt waits, a shared step decodes max_shared_rows // DECODING_PART
# sequences, or one of each request if these are more.
DECODING_PART = 4
# A shared step has at least this many rows of a prompt, or none: the values are copied in any case.
MIN_ROWS = 4
# A request is ordered by num_rows // ROWS_PER_TURN, then by its arrival.
ROWS_PER_TURN = 64
# Every 4th step begins with the request that has gone longest without a row.
LONGEST_WAIT_STRIDE = 4
# Rows of a prompt in a step of one request alone, at least, however long the prompt is.
MIN_ROWS_ALONE = 192
# Attention to this many positions takes as long as the rest of a row's forward (0.5B, int8).
POSITIONS_PER_ROW = 2048


@dataclass(frozen=True)
class ScheduledChunk:
    """What is computed of a sequence in a step: tokens, then continuations behind its prompt."""

    sequence: Sequence
    num_tokens: int
    num_continuations: int = 0

    @property
    def continuations(self) -> list[list[int]]:
        """Those that are scored in this step."""
        begin = self.sequence.num_scored
        return self.sequence.continuations[begin : begin + self.num_continuations]

    @property
    def num_rows(self) -> int:
        """Rows of the forward; the last token of a continuation needs none."""
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
        """Notes that the chunk was computed. What the chunk says of itself no longer holds."""
        sequence = self.sequence
        sequence.work.num_rows += self.num_rows
        sequence.num_computed += self.num_tokens
        sequence.num_scored += self.num_continuations


class Scheduler:
    """Shares every step among the requests that have work; sequences join and leave at any step.

    A step has at most `max_rows` rows: a token of each decoding sequence, and tokens of prompts
    and continuations. One request alone may use them all. A continuation longer than that is
    computed in one step all the same.
    """

    def __init__(self, max_num_seqs: int, max_rows: int, allocator: Allocator) -> None:
        """max_num_seqs: sequences that decode in one step, and requests that run at once."""
        assert max_num_seqs > 0 and max_rows > 1
        self.admission = Admission(max_num_seqs, allocator)  # where sequences join and leave
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
        # For the first prompt; the others wait for a step with more room.
        least = min(max_rows, MIN_ROWS if is_shared else MIN_ROWS_ALONE)
        min_rows = least if is_shared else 1
        rows_left = float(max_rows)
        for sequence in self._prefilling():
            # A row costs more the more positions it attends to.
            cost = 1 + sequence.num_computed / POSITIONS_PER_ROW
            num_rows = max(round(rows_left / cost), least)
            if num_rows < min(min_rows, max(sequence.num_uncomputed, 1)):
                continue
            chunk = _chunk(sequence, num_rows)
            chunks.append(chunk)
            rows_left -= chunk.num_rows * cost
            least = 0
        for chunk in chunks:
            chunk.sequence.last_step = chunk.sequence.work.last_step = self._num_steps
        # To make room for one, another may have been suspended that was scheduled before it.
        return [chunk for chunk in chunks if chunk.sequence in self.admission.running]

    def _decoding(self) -> list[Sequence]:
        """The sequences that decode in this step: if not all, first one of each request."""
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
        least = max(1, self.max_shared_rows // 2)
        return min(max(self.max_shared_rows - num_decoding, least), self._max_rows - num_decoding)

    def _prefilling(self) -> list[Sequence]:
        """The other sequences, those of the request whose turn it is first."""
        prefilling = [sequence for sequence in self.admission.running if not sequence.is_decoding]
        if self._num_steps % LONGEST_WAIT_STRIDE == 0:
            return sorted(prefilling, key=lambda s: (s.work.last_step, s.work.arrived_at))
        return sorted(
            prefilling, key=lambda s: (s.work.num_rows // ROWS_PER_TURN, s.work.arrived_at)
        )


def _chunk(sequence: Sequence, max_rows: int) -> ScheduledChunk:
    """As much of the sequence as fits the rows; a continuation is never divided."""
    num_tokens = min(sequence.num_uncomputed, max_rows)
    num_continuations = 0
    if num_tokens == sequence.num_uncomputed:
        rows_left = max_rows - num_tokens
        for ids in sequence.continuations[sequence.num_scored :]:
            rows_left -= len(ids) - 1
            # One that is longer than the step is computed on its own.
            if rows_left < 0 and num_tokens + num_continuations:
                break
            num_continuations += 1
    return ScheduledChunk(sequence, num_tokens, num_continuations)
