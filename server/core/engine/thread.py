"""The engine's thread: takes commands, computes steps, delivers events.

Knows token ids and the model runner, but no event loop.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable

from server.core.engine.allocator import RunnerAllocator
from server.core.engine.engine import Observer
from server.core.engine.runner import Runner, StepInterruptedError, StepResult
from server.core.engine.scheduler import ScheduledChunk, Scheduler
from server.core.engine.sequence import (
    AbortedEvent,
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    Sequence,
    TokenEvent,
)
from server.core.engine.stream import EngineClosedError
from server.core.engine.work import Work

logger = logging.getLogger(__name__)

# Idle seconds before freed memory is returned to the operating system.
REST_AFTER_S = 5.0


class EngineThread(threading.Thread):
    """Owns the runner, and computes steps until it is closed or breaks down."""

    def __init__(self, runner: Runner, *, max_num_seqs: int, max_rows: int) -> None:
        super().__init__(name="engine", daemon=True)
        self.observer: Observer | None = None
        self.breakdown: Exception | None = None  # that ended the thread
        self.is_closed = False
        self._runner = runner
        self.scheduler = Scheduler(max_num_seqs, max_rows, RunnerAllocator(runner, self._end))
        self._admission = self.scheduler.admission
        # The only request of the current step, if the step may be interrupted.
        self._interruptible: Work | None = None
        self._interrupted: Work | None = None  # the request whose last long step was interrupted
        # A sequence to add, a sequence to abort, or None to close.
        self._commands: queue.SimpleQueue[tuple[str, Sequence] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # keeps sequences from being queued after the close

    def add(self, sequence: Sequence) -> None:
        """Queues the sequence. Thread-safe.

        Raises:
            EngineClosedError: the engine is closing.
        """
        with self._lock:
            if self.is_closed:
                raise EngineClosedError
            self._commands.put(("add", sequence))
        if sequence.work is not self._interruptible:
            self._interruptible = None

    def abort(self, sequence: Sequence) -> None:
        """Ends the sequence if it has not ended. Thread-safe and idempotent."""
        self._commands.put(("abort", sequence))

    def close(self) -> None:
        """Aborts every sequence and ends the thread. Thread-safe and idempotent."""
        with self._lock:
            if not self.is_closed:
                self.is_closed = True
                self._commands.put(None)
        self.join()

    def run(self) -> None:
        """Runs on the thread itself, as do all methods below."""
        end: Event = AbortedEvent()
        try:
            while self._take_commands():
                self._step()
        except Exception as error:
            logger.critical("the engine has broken down", exc_info=error)
            self.breakdown = error
            end = FailedEvent(error)
        with self._lock:
            self.is_closed = True
        while not self._commands.empty():
            match self._commands.get():
                case ("add", sequence):
                    self._admission.add(sequence)
        for sequence in [*self._admission.running, *self._admission.waiting]:
            self._end(sequence, end)

    def _take_commands(self) -> bool:
        """Waits for work, then takes all queued commands. Returns False to close."""
        timeout_s: float | None = REST_AFTER_S
        while True:
            try:
                command = self._commands.get(self._admission.is_idle, timeout_s)
            except queue.Empty:
                if not self._admission.is_idle:
                    return True
                self._runner.rest()
                timeout_s = None
                continue
            match command:
                case None:
                    return False
                case ("add", sequence):
                    self._admission.add(sequence)
                case (_, sequence):
                    self._end(sequence, AbortedEvent())

    def _step(self) -> None:
        chunks = self.scheduler.schedule()
        if not chunks:
            return  # every scheduled sequence has failed
        works = {chunk.sequence.work for chunk in chunks}
        is_short = sum(chunk.num_rows for chunk in chunks) <= self.scheduler.max_shared_rows
        if len(works) > 1 or is_short or self._interrupted in works:
            results = self._compute(chunks, lambda: False)
        else:
            # Interrupted as soon as another request arrives.
            [self._interruptible] = works
            try:
                if not self._commands.empty():
                    return  # another request may have arrived before the step was interruptible
                results = self._compute(chunks, lambda: self._interruptible is None)
            except StepInterruptedError:
                # The next long step of this request is not interrupted.
                self._interrupted = chunks[0].sequence.work
                return
            finally:
                self._interruptible = None
        if not is_short and self._interrupted in works:
            self._interrupted = None
        for chunk in chunks:
            chunk.advance()
        for sequence, result in results.items():
            self._postprocess(sequence, result)

    def _compute(
        self, chunks: list[ScheduledChunk], should_stop: Callable[[], bool]
    ) -> dict[Sequence, StepResult | Exception]:
        """Computes the chunks in one step; if that fails, each alone, to find the faulty one."""
        try:
            return self._runner.step(chunks, should_stop)
        except StepInterruptedError:
            raise
        except Exception as error:
            if len(chunks) == 1:
                return {chunks[0].sequence: error}
            logger.warning("a step of %d sequences failed; each is computed alone", len(chunks))
            return {
                sequence: result
                for chunk in chunks
                for sequence, result in self._compute([chunk], lambda: False).items()
            }

    def _postprocess(self, sequence: Sequence, result: StepResult | Exception) -> None:
        if isinstance(result, Exception):
            sequence.context.run(logger.error, "a sequence failed", exc_info=result)
            self._end(sequence, FailedEvent(result))
            return
        if not isinstance(result, list):
            self._end(sequence, result)
            return
        sequence.num_computed += len(result) - 1
        for token in result:
            self._add_token(sequence, token)

    def _add_token(self, sequence: Sequence, token: TokenEvent) -> None:
        params = sequence.params
        assert params is not None
        if token.token_id in params.stop_token_ids:
            self._end(sequence, FinishedEvent(FinishReason.STOP))
            return
        if self.observer is not None:
            now, is_first = time.perf_counter(), not sequence.completion_ids
            self.observer.token_sampled(now - sequence.last_event_at, is_first=is_first)
            sequence.last_event_at = now
        sequence.completion_ids.append(token.token_id)
        sequence.deliver(token)
        if len(sequence.completion_ids) >= params.max_tokens:
            self._end(sequence, FinishedEvent(FinishReason.LENGTH))

    def _end(self, sequence: Sequence, event: Event) -> None:
        """Frees the sequence's slot and delivers its only terminal event. Idempotent."""
        if self._admission.remove(sequence):
            try:
                self._runner.release(sequence, is_sound=not isinstance(event, FailedEvent))
            except Exception:
                # Only the reuse of its keys and values is lost.
                sequence.context.run(logger.exception, "releasing a sequence failed")
            if self.observer is not None:
                self.observer.sequence_ended(sequence)
            sequence.deliver(event)
