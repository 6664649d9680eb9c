"""Decides which sequences run in the next step. Knows token counts, not tensors or text."""

from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

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
# A sequence that does not fit lets later ones go first for this many steps.
MAX_STEPS_PASSED_BY = 500
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
        """Whether the sequence has no token left to compute."""
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


class Memory(Protocol):
    """Where sequences keep what they have computed. The scheduler only asks whether it fits."""

    def admit(self, sequence: Sequence) -> bool:
        """Takes in a sequence with all its tokens; False: not now."""

    def fits(self, sequence: Sequence, without: Collection[Sequence]) -> bool:
        """Whether the sequence could be admitted if the others were suspended."""

    def reserve(self, sequence: Sequence, num_rows: int) -> bool:
        """Makes room for more rows; never False for a sequence that is alone."""

    def suspend(self, sequence: Sequence) -> None:
        """Frees the memory of an admitted sequence, which will be admitted again."""


class Scheduler:
    """Shares every step among the requests that have work; sequences join and leave at any step.

    A step has at most `max_rows` rows: a token of each decoding sequence, and tokens of prompts
    and continuations. One request alone may use them all. A continuation longer than that is
    computed in one step all the same. When memory is short, the request with the most running
    sequences gives one up, which is computed again later.
    """

    def __init__(self, max_num_seqs: int, max_rows: int, memory: Memory) -> None:
        """max_num_seqs: sequences that decode in one step, and requests that run at once."""
        assert max_num_seqs > 0 and max_rows > 1
        self.running: list[Sequence] = []  # in the order of their admission
        self.max_shared_rows = max(2, max_rows // SHARED_PART)
        self._waiting: dict[Work, deque[Sequence]] = {}
        self._max_num_seqs, self._max_rows, self._memory = max_num_seqs, max_rows, memory
        self._num_steps = 0

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences that are not running, by request. Any thread."""
        return [sequence for queue in list(self._waiting.values()) for sequence in list(queue)]

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self._waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """Takes in a sequence, which waits behind the others of its request."""
        self._waiting.setdefault(sequence.work, deque()).append(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Forgets the sequence. Returns whether it was here."""
        if sequence in self.running:
            self.running.remove(sequence)
            return True
        if sequence in self._waiting.get(sequence.work, ()):
            self._take_from_waiting(sequence)
            return True
        return False

    def schedule(self) -> list[ScheduledChunk]:
        """The chunks of the next step; admits waiting sequences while there is room."""
        self._admit_waiting()
        self._num_steps += 1
        chunks: list[ScheduledChunk] = []
        for sequence in self._decoding():
            if self._make_room(sequence, 1):
                chunks.append(ScheduledChunk(sequence, 1))
        is_shared = len({sequence.work for sequence in self.running}) > 1
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
            if self._make_room(sequence, chunk.num_tokens):
                chunks.append(chunk)
                rows_left -= chunk.num_rows * cost
                least = 0
        for chunk in chunks:
            chunk.sequence.last_step = chunk.sequence.work.last_step = self._num_steps
        # To make room for one, another may have been suspended that was scheduled before it.
        return [chunk for chunk in chunks if chunk.sequence in self.running]

    # --- who computes in the step -----------------------------------------------------

    def _decoding(self) -> list[Sequence]:
        """The sequences that decode in this step: if not all, first one of each request."""
        decoding = [sequence for sequence in self.running if sequence.is_decoding]
        limit = min(self._max_num_seqs, self._max_rows - (len(decoding) < len(self.running)))
        works = {sequence.work for sequence in decoding}
        if works != {sequence.work for sequence in self.running}:
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
        prefilling = [sequence for sequence in self.running if not sequence.is_decoding]
        if self._num_steps % LONGEST_WAIT_STRIDE == 0:
            return sorted(prefilling, key=lambda s: (s.work.last_step, s.work.arrived_at))
        return sorted(
            prefilling, key=lambda s: (s.work.num_rows // ROWS_PER_TURN, s.work.arrived_at)
        )

    # --- who has memory ---------------------------------------------------------------

    def _admit_waiting(self) -> None:
        too_large: set[Work] = set()  # what does not fit now; smaller ones may
        while (sequence := self._next_waiting(too_large)) is not None:
            self._take_from_waiting(sequence)
            self.running.append(sequence)
            # Admission may fail the sequence, which is then in neither place.
            if self._memory.admit(sequence) or sequence not in self.running:
                # A new request waits for its first row from now on.
                sequence.work.last_step = sequence.work.last_step or self._num_steps
                sequence.work.refused_at = None
                continue
            self._put_back(sequence)
            if victims := self._victims_for(sequence):
                for victim in victims:
                    self._suspend(victim)
                continue
            work = sequence.work
            work.refused_at = self._num_steps if work.refused_at is None else work.refused_at
            if self._num_steps - work.refused_at > MAX_STEPS_PASSED_BY:
                return
            too_large.add(work)

    def _victims_for(self, sequence: Sequence) -> list[Sequence]:
        """Sequences of requests that have more; without them this one fits. Empty: it does not."""
        num_running = self._num_running()
        num_own, victims = num_running[sequence.work], list[Sequence]()
        newest_first = self.running[::-1]
        for running in sorted(newest_first, key=lambda s: -num_running[s.work]):
            if num_running[running.work] <= num_own + 1:
                continue
            num_running[running.work] -= 1
            victims.append(running)
            if self._memory.fits(sequence, victims):
                return victims
        return []

    def _next_waiting(self, excluded: Collection[Work]) -> Sequence | None:
        """A sequence of the request that has the fewest running; None if all must wait."""
        num_running = self._num_running()
        num_works = len({*self._waiting, *num_running})
        fair_share = max(1, self._max_num_seqs // max(1, num_works))

        def may_run(work: Work) -> bool:
            if work in excluded:
                return False
            # A request that was taken up does not wait again for its next sequences.
            if work.queue_s is None and len(num_running) >= self._max_num_seqs:
                return False
            has_room = len(self.running) < self._max_num_seqs or num_running[work] < fair_share
            return has_room and num_running[work] < self._max_num_seqs

        works = filter(may_run, self._waiting)
        work = min(works, key=lambda work: (num_running[work], work.arrived_at), default=None)
        return None if work is None else self._waiting[work][0]

    def _make_room(self, sequence: Sequence, num_rows: int) -> bool:
        """Suspends others until the rows fit; False if the sequence itself was suspended."""
        while sequence in self.running:
            if self._memory.reserve(sequence, num_rows):
                return True
            # Reserving may also fail the sequence.
            if sequence in self.running:
                self._suspend(self._next_to_suspend())
        return False

    def _next_to_suspend(self) -> Sequence:
        """The newest sequence of the request with the most running; on a tie, of the newest one."""
        num_running = self._num_running()
        work = max(num_running, key=lambda work: (num_running[work], work.arrived_at))
        return next(s for s in reversed(self.running) if s.work is work)

    def _num_running(self) -> Counter[Work]:
        return Counter(sequence.work for sequence in self.running)

    def _suspend(self, sequence: Sequence) -> None:
        self._memory.suspend(sequence)
        # Suspending may also fail the sequence.
        if sequence in self.running:
            self._put_back(sequence)

    def _put_back(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._waiting.setdefault(sequence.work, deque()).appendleft(sequence)

    def _take_from_waiting(self, sequence: Sequence) -> None:
        queue = self._waiting[sequence.work]
        queue.remove(sequence)
        if not queue:
            del self._waiting[sequence.work]


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
