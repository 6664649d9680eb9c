"""The runner as the admission sees it: what gives sequences memory."""

import logging
import time
from collections.abc import Callable, Collection

from server.core.engine.runner import Runner
from server.core.engine.sequence import Event, FailedEvent, Sequence

logger = logging.getLogger(__name__)


class RunnerAllocator:
    """Asks the runner; a sequence whose call raises is failed, and no other."""

    def __init__(self, runner: Runner, end: Callable[[Sequence, Event], None]) -> None:
        self._runner, self._end = runner, end

    def admit(self, sequence: Sequence) -> bool:
        try:
            num_known = self._runner.admit(sequence)
        except Exception as error:
            return self._failed(sequence, error)
        if num_known is None:
            return False
        sequence.num_computed, sequence.num_scored = num_known, 0
        if sequence.num_cached is None:
            sequence.num_cached = num_known
        if sequence.work.queue_s is None:
            sequence.work.queue_s = time.perf_counter() - sequence.last_event_at
        return True

    def fits(self, sequence: Sequence, without: Collection[Sequence]) -> bool:
        return self._runner.fits(sequence, without)

    def reserve(self, sequence: Sequence) -> bool:
        try:
            return self._runner.reserve(sequence)
        except Exception as error:
            return self._failed(sequence, error)

    def suspend(self, sequence: Sequence) -> None:
        try:
            self._runner.suspend(sequence)
        except Exception as error:
            self._failed(sequence, error)
        sequence.num_computed = sequence.num_scored = 0

    def _failed(self, sequence: Sequence, error: Exception) -> bool:
        sequence.context.run(logger.error, "no memory could be had for a sequence", exc_info=error)
        self._end(sequence, FailedEvent(error))
        return False
