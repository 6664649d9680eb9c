"""The one thread that owns the model: submit, score, abort, close.

Knows token ids, not text and not sentiment. The public methods belong to the event loop;
everything below runs on the engine's thread, so the loop is never blocked.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from server.core.engine.allocator import RunnerAllocator
from server.core.engine.runner import Runner, StepInterruptedError, StepResult
from server.core.engine.scheduler import ScheduledChunk, Scheduler
from server.core.engine.sequence import (
    AbortedEvent,
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    PrefilledEvent,
    SamplingParams,
    ScoredEvent,
    Sequence,
    TokenEvent,
)
from server.core.engine.stream import EngineClosedError, TokenStream, as_error, deliver, last_event
from server.core.engine.work import Work

logger = logging.getLogger(__name__)

# Idle seconds before freed memory is returned to the operating system.
REST_AFTER_S = 5.0


class Observer(Protocol):
    """Who wants to know how the engine does. Called on the engine's thread."""

    def token_sampled(self, seconds: float, *, is_first: bool) -> None:
        """seconds: since the sequence was submitted, or since its last token."""

    def sequence_ended(self, sequence: Sequence) -> None:
        """However it ended."""


@dataclass(frozen=True)
class Scores:
    """What was asked for about the end of a prompt, and how much of the prompt was known.

    logprobs: (nats) of every continuation.
    hidden_states: (L, C), of the last prompt token after each layer asked for, or None.
    """

    logprobs: list[float]
    num_cached: int
    hidden_states: NDArray[np.float32] | None = None


class Engine:
    """Runs sequences in continuous batches on a thread of its own."""

    def __init__(
        self, runner: Runner, *, max_num_seqs: int, max_rows: int,
        observer: Observer | None = None,
    ) -> None:  # fmt: skip
        """max_num_seqs, max_rows: as the scheduler has them."""
        self._runner, self._observer = runner, observer
        self._scheduler = Scheduler(max_num_seqs, max_rows, RunnerAllocator(runner, self._end))
        # The only request in the step that is computed now, if the step may be interrupted.
        self._interruptible: Work | None = None
        self._interrupted: Work | None = None  # the request whose last long step was given up
        # A sequence to add, a sequence to abort, or None to close.
        self._commands: queue.SimpleQueue[tuple[str, Sequence] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # no sequence may slip in behind the closing command
        self._is_closed = False
        self.breakdown: Exception | None = None  # what ended the thread, if not a close
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, *, work: Work | None = None
    ) -> TokenStream:
        """Starts to continue the prompt. Call from the event loop.

        work: of the request; None: the sequence is one of its own.

        Raises:
            EngineClosedError: the engine is closing.
        """
        assert prompt_ids and params.max_tokens > 0
        return self._start(prompt_ids, params, work=work)

    async def score(
        self,
        prompt_ids: list[int],
        continuations: list[list[int]],
        *,
        layers: tuple[int, ...] = (),
        num_shared: int = 0,
        is_pinned: bool = False,
        work: Work | None = None,
    ) -> Scores:
        """Scores each continuation after the prompt.

        layers: those whose hidden states are wanted, rising from 1. Without continuations the
        forward ends for this prompt after the last of them.
        num_shared: first tokens that later prompts will have too; they are computed once.
        is_pinned: whether these are kept for good.
        work: of the request; None: the sequence is one of its own.
        A cancelled call frees its slot.

        Raises:
            EngineClosedError: the engine is closing.
        """
        assert prompt_ids and (continuations or layers) and all(continuations)
        stream = self._start(
            prompt_ids,
            None,
            continuations,
            layers=layers,
            num_shared=num_shared,
            is_pinned=is_pinned,
            work=work,
        )
        end = await last_event(stream)
        if not isinstance(end, ScoredEvent):
            raise as_error(end)
        return Scores(end.logprobs, stream.num_cached, end.hidden_states)

    async def prefill(self, prompt_ids: list[int], *, work: Work | None = None) -> int | None:
        """Computes the prompt, so that a sequence that begins with it starts sooner.

        Returns how many of its tokens were known already; None, and nothing is computed, if it is
        too long to be kept. A cancelled call frees its slot.

        work: of the request; None: the sequence is one of its own.

        Raises:
            EngineClosedError: the engine is closing.
        """
        if not self._runner.is_kept(len(prompt_ids)):
            return None
        stream = self._start(prompt_ids, None, work=work)
        end = await last_event(stream)
        if not isinstance(end, PrefilledEvent):
            raise as_error(end)
        return stream.num_cached

    def observe(self, observer: Observer) -> None:
        """Reports to the observer from now on."""
        self._observer = observer

    @property
    def is_alive(self) -> bool:
        """Whether the engine still works on sequences."""
        return self._thread.is_alive() and not self._is_closed

    @property
    def num_running(self) -> int:
        """Sequences that hold memory. A step computes some or all of them."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for memory, or for their request's turn."""
        return len(self._scheduler.waiting)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the memory in use has room for."""
        return self._runner.num_kv_tokens

    def close(self) -> None:
        """Aborts every sequence and ends the thread. May be called twice."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._commands.put(None)
        self._thread.join()

    def _start(
        self,
        prompt_ids: list[int],
        params: SamplingParams | None,
        continuations: Iterable[list[int]] = (),
        *,
        layers: tuple[int, ...] = (),
        num_shared: int = 0,
        is_pinned: bool = False,
        work: Work | None = None,
    ) -> TokenStream:
        loop = asyncio.get_running_loop()
        sequence = Sequence(
            prompt_ids,
            params,
            list(continuations),
            lambda event: deliver(loop, stream, event),
            layers,
            num_shared,
            is_pinned,
            work or Work(),
        )
        stream = TokenStream(lambda: self._abort(sequence), lambda: sequence.num_cached or 0)
        with self._lock:
            if self._is_closed:
                raise EngineClosedError
            self._commands.put(("add", sequence))
        if sequence.work is not self._interruptible:
            self._interruptible = None
        return stream

    def _abort(self, sequence: Sequence) -> None:
        """Ends the sequence if it still runs. Any thread, any number of times."""
        self._commands.put(("abort", sequence))

    # --- below: the engine's thread -------------------------------------------------

    def _run(self) -> None:
        end: Event = AbortedEvent()
        try:
            while self._take_commands():
                self._step()
        except Exception as error:
            logger.critical("the engine has broken down", exc_info=error)
            self.breakdown = error
            end = FailedEvent(error)
        with self._lock:
            self._is_closed = True
        while not self._commands.empty():
            match self._commands.get():
                case ("add", sequence):
                    self._scheduler.add(sequence)
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            self._end(sequence, end)

    def _take_commands(self) -> bool:
        """Waits for work, then takes all commands there are. False: close."""
        patience_s: float | None = REST_AFTER_S
        while True:
            try:
                command = self._commands.get(self._scheduler.is_idle, patience_s)
            except queue.Empty:
                if not self._scheduler.is_idle:
                    return True
                self._runner.rest()
                patience_s = None
                continue
            match command:
                case None:
                    return False
                case ("add", sequence):
                    self._scheduler.add(sequence)
                case (_, sequence):
                    self._end(sequence, AbortedEvent())

    def _step(self) -> None:
        chunks = self._scheduler.schedule()
        if not chunks:
            return  # every scheduled sequence has failed
        works = {chunk.sequence.work for chunk in chunks}
        is_short = sum(chunk.num_rows for chunk in chunks) <= self._scheduler.max_shared_rows
        if len(works) > 1 or is_short or self._interrupted in works:
            results = self._compute(chunks, lambda: False)
        else:
            # Given up as soon as another request comes.
            [self._interruptible] = works
            try:
                if not self._commands.empty():
                    return  # the next request came while this step was scheduled
                results = self._compute(chunks, lambda: self._interruptible is None)
            except StepInterruptedError:
                # The next long step of this request is computed to its end, whoever comes.
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
        """One step of the runner; if it fails, one for each chunk: only the faulty one fails."""
        try:
            return self._runner.step(chunks, should_stop)
        except StepInterruptedError:
            raise
        except Exception as error:
            if len(chunks) == 1:
                return {chunks[0].sequence: error}
            logger.warning("a step of %d sequences failed; each is tried alone", len(chunks))
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
        if not isinstance(result, TokenEvent):
            self._end(sequence, result)
            return
        params = sequence.params
        assert params is not None
        if result.token_id in params.stop_token_ids:
            self._end(sequence, FinishedEvent(FinishReason.STOP))
            return
        if self._observer is not None:
            now, is_first = time.perf_counter(), not sequence.completion_ids
            self._observer.token_sampled(now - sequence.last_event_at, is_first=is_first)
            sequence.last_event_at = now
        sequence.completion_ids.append(result.token_id)
        sequence.deliver(result)
        if len(sequence.completion_ids) >= params.max_tokens:
            self._end(sequence, FinishedEvent(FinishReason.LENGTH))

    def _end(self, sequence: Sequence, event: Event) -> None:
        """The one way out: frees the slot and delivers exactly one terminal event."""
        if self._scheduler.remove(sequence):
            try:
                self._runner.release(sequence, is_sound=not isinstance(event, FailedEvent))
            except Exception:
                # Only what others could have reused is lost.
                sequence.context.run(logger.exception, "a sequence was not released in order")
            if self._observer is not None:
                self._observer.sequence_ended(sequence)
            sequence.deliver(event)
