"""Decides which sequences hold memory. Knows requests and counts, not what a step computes."""

from collections import Counter, deque
from collections.abc import Collection
from typing import Protocol

from server.core.engine.sequence import Sequence
from server.core.engine.work import Work

# Smaller sequences may pass one that does not fit for this many steps.
MAX_STEPS_PASSED_BY = 500


class Allocator(Protocol):
    """Allocates memory to sequences. A call may fail its sequence, which is then removed."""

    def admit(self, sequence: Sequence) -> bool:
        """Allocates memory for all tokens of a sequence; False if it was not admitted."""

    def fits(self, sequence: Sequence, without: Collection[Sequence]) -> bool:
        """Whether the sequence could be admitted if those of `without` were suspended."""

    def reserve(self, sequence: Sequence) -> bool:
        """Makes room for one more token. A lone sequence always has room."""

    def suspend(self, sequence: Sequence) -> None:
        """Frees the memory of an admitted sequence; a later `admit` resumes it."""


class Admission:
    """Shares memory among the requests.

    When memory is short, a sequence of the request with the most running ones is suspended and
    computed again later.
    """

    def __init__(self, max_num_seqs: int, allocator: Allocator) -> None:
        """max_num_seqs: see `Scheduler`."""
        self.running: list[Sequence] = []  # in the order of their admission
        self._waiting: dict[Work, deque[Sequence]] = {}
        self._max_num_seqs, self._allocator = max_num_seqs, allocator

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences that are not running, by request. Thread-safe."""
        return [sequence for queue in list(self._waiting.values()) for sequence in list(queue)]

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self._waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """Appends a sequence to the queue of its request."""
        self._waiting.setdefault(sequence.work, deque()).append(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Removes the sequence. Returns whether it was running or waiting."""
        if sequence in self.running:
            self.running.remove(sequence)
            return True
        if sequence in self._waiting.get(sequence.work, ()):
            self._take_from_waiting(sequence)
            return True
        return False

    def admit_waiting(self, step: int) -> None:
        """Admits sequences while there is room.

        step: number of the last step.
        """
        too_large: set[Work] = set()  # requests whose next sequence does not fit now
        while (sequence := self._next_waiting(too_large)) is not None:
            self._take_from_waiting(sequence)
            self.running.append(sequence)
            # Admission may fail the sequence, which is then removed.
            if self._allocator.admit(sequence) or sequence not in self.running:
                # A new request waits for its first row from its admission on.
                sequence.work.last_step = sequence.work.last_step or step
                sequence.work.refused_at = None
                continue
            self._put_back(sequence)
            if victims := self._victims_for(sequence):
                for victim in victims:
                    self._suspend(victim)
                continue
            work = sequence.work
            work.refused_at = step if work.refused_at is None else work.refused_at
            if step - work.refused_at > MAX_STEPS_PASSED_BY:
                return
            too_large.add(work)

    def make_room(self, sequence: Sequence) -> bool:
        """Suspends sequences until one more token fits; False if this one no longer runs."""
        while sequence in self.running:
            if self._allocator.reserve(sequence):
                return True
            # Reserving may also fail the sequence.
            if sequence in self.running:
                self._suspend(self._next_to_suspend())
        return False

    def _victims_for(self, sequence: Sequence) -> list[Sequence]:
        """Sequences of larger requests to suspend so that this one fits; empty if none suffice."""
        num_running = self._num_running()
        num_own, victims = num_running[sequence.work], list[Sequence]()
        newest_first = self.running[::-1]
        for running in sorted(newest_first, key=lambda s: -num_running[s.work]):
            if num_running[running.work] <= num_own + 1:
                continue
            num_running[running.work] -= 1
            victims.append(running)
            if self._allocator.fits(sequence, victims):
                return victims
        return []

    def _next_waiting(self, excluded: Collection[Work]) -> Sequence | None:
        """The next sequence of the request with the fewest running ones; None if all must wait."""
        num_running = self._num_running()
        num_works = len({*self._waiting, *num_running})
        fair_share = max(1, self._max_num_seqs // max(1, num_works))

        def may_run(work: Work) -> bool:
            if work in excluded:
                return False
            # Once admitted, a request does not wait again for other requests to end.
            if work.queue_s is None and len(num_running) >= self._max_num_seqs:
                return False
            has_room = len(self.running) < self._max_num_seqs or num_running[work] < fair_share
            return has_room and num_running[work] < self._max_num_seqs

        works = filter(may_run, self._waiting)
        work = min(works, key=lambda work: (num_running[work], work.arrived_at), default=None)
        return None if work is None else self._waiting[work][0]

    def _next_to_suspend(self) -> Sequence:
        """The newest sequence of the request with the most running ones; of the newest on a tie."""
        num_running = self._num_running()
        work = max(num_running, key=lambda work: (num_running[work], work.arrived_at))
        return next(s for s in reversed(self.running) if s.work is work)

    def _num_running(self) -> Counter[Work]:
        return Counter(sequence.work for sequence in self.running)

    def _suspend(self, sequence: Sequence) -> None:
        self._allocator.suspend(sequence)
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
