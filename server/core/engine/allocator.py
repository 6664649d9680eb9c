"""Adapts the runner's memory for the scheduler."""

import logging
import time
from collections.abc import Callable, Collection

from server.core.engine.runner import Runner
from server.core.engine.sequence import Event, FailedEvent, Sequence

logger = logging.getLogger(__name__)


class RunnerAllocator:
    """An `Allocator` that calls the runner; a sequence whose call raises is failed, and no other.

    end: removes a sequence and delivers its terminal event.
    """

    def __init__(self, runner: Runner, end: Callable[[Sequence, Event], None]) -> None:
        self._runner, self._end = runner, end

    def admit(self, sequence: Sequence) -> bool:
        try:
            num_cached = self._runner.admit(sequence)
        except Exception as error:
            return self._fail(sequence, error)
        if num_cached is None:
            return False
        sequence.num_computed, sequence.num_scored = num_cached, 0
        if sequence.num_cached is None:
            sequence.num_cached = num_cached
        if sequence.work.queue_s is None:
            sequence.work.queue_s = time.perf_counter() - sequence.last_event_at
        return True

    def fits(self, sequence: Sequence, without: Collection[Sequence]) -> bool:
        return self._runner.fits(sequence, without)

    def reserve(self, sequence: Sequence) -> bool:
        try:
            return self._runner.reserve(sequence)
        except Exception as error:
            return self._fail(sequence, error)

    def suspend(self, sequence: Sequence) -> None:
        try:
            self._runner.suspend(sequence)
        except Exception as error:
            self._fail(sequence, error)
        sequence.num_computed = sequence.num_scored = 0

    def _fail(self, sequence: Sequence, error: Exception) -> bool:
        sequence.context.run(logger.error, "a sequence's memory call failed", exc_info=error)
        self._end(sequence, FailedEvent(error))
        return False
