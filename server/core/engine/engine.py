"""The one thread that owns the model: submit, score, abort, close.

Knows token ids, not text and not sentiment. The public methods belong to the event loop;
everything below runs on the engine's thread, so the loop is never blocked.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

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
from server.core.engine.timings import note_queue
from server.errors import UnavailableError

logger = logging.getLogger(__name__)

# So long without work, and no one is expected at once.
REST_AFTER_S = 5.0


class EngineClosedError(UnavailableError):
    """The engine takes no more sequences."""


class SequenceAbortedError(UnavailableError):
    """The sequence was aborted before it was done."""


# What one sequence got out of a step: a sampled token, the scores it asked for, or only
# the news that its prompt is computed.
StepResult = TokenEvent | ScoredEvent | PrefilledEvent


@dataclass(frozen=True)
class Scores:
    """What was asked for about the end of a prompt, and how much of the prompt was known.

    logprobs: (nats) of every continuation.
    hidden_states: (L, C), of the last prompt token after each layer asked for, or None.
    """

    logprobs: list[float]
    num_cached: int
    hidden_states: NDArray[np.float32] | None = None


class Runner(Protocol):
    """What the engine needs of a model runner."""

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the memory in use has room for."""

    def step(self, chunks: list[ScheduledChunk]) -> dict[Sequence, StepResult | Exception]:
        """Computes the chunks; a result, or what went wrong, for every finished prompt.

        A step that raises has sampled nothing: its chunks may be tried again.
        """

    def admit(self, sequence: Sequence) -> int | None:
        """Makes room for the sequence; returns how many of its tokens are known already.

        None: there is no room now.
        """

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Makes room for an admitted sequence's next tokens, if there is any."""

    def suspend(self, sequence: Sequence) -> None:
        """Gives the sequence's room to others; admitting it again goes on where it was."""

    def release(self, sequence: Sequence, *, is_sound: bool) -> None:
        """Frees what the sequence held; what it computed may be reused if it is sound.

        Harmless if it held nothing.
        """

    def is_kept(self, num_tokens: int) -> bool:
        """Whether a prompt of that length, once computed, is kept for others. Any thread."""

    def rest(self) -> None:
        """Gives memory that nothing is in back to the system: there is no work for now."""


class Observer(Protocol):
    """Who wants to know how the engine does. Called on the engine's thread."""

    def token_sampled(self, seconds: float, *, is_first: bool) -> None:
        """seconds: since the sequence was submitted, or since its last token."""

    def sequence_ended(self, sequence: Sequence) -> None:
        """However it ended."""


class TokenStream:
    """The tokens of one submitted sequence, for one reader.

    `finish_reason` is set once the iteration has ended by itself.
    """

    def __init__(
        self, abort: Callable[[], None], count_cached: Callable[[], int] = lambda: 0
    ) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.finish_reason: FinishReason | None = None
        self.abort = abort
        self._count_cached = count_cached

    @property
    def num_cached(self) -> int:
        """Prompt tokens that needed no computing; known once a first event has come."""
        return self._count_cached()

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while True:
            match await self.events.get():
                case TokenEvent() as token:
                    yield token
                case FinishedEvent(reason):
                    self.finish_reason = reason
                    return
                case event:
                    raise _as_error(event)


class Engine:
    """Runs sequences in continuous batches on a thread of its own."""

    def __init__(
        self, runner: Runner, *, max_num_seqs: int, max_prefill_tokens: int,
        observer: Observer | None = None,
    ) -> None:  # fmt: skip
        self._runner, self._observer = runner, observer
        self._scheduler = Scheduler(max_num_seqs, max_prefill_tokens, _Memory(runner, self._end))
        # A sequence to add, a sequence to abort, or None to close.
        self._commands: queue.SimpleQueue[tuple[str, Sequence] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # no sequence may slip in behind the closing command
        self._is_closed = False
        self.breakdown: Exception | None = None  # what ended the thread, if not a close
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, prompt_ids: list[int], params: SamplingParams) -> TokenStream:
        """Starts to continue the prompt. Call from the event loop.

        Raises:
            EngineClosedError: the engine is closing.
        """
        assert prompt_ids and params.max_tokens > 0
        return self._start(prompt_ids, params)

    async def score(
        self,
        prompt_ids: list[int],
        continuations: list[list[int]],
        *,
        layers: tuple[int, ...] = (),
        num_shared: int = 0,
        is_pinned: bool = False,
    ) -> Scores:
        """Scores each continuation after the prompt, all in one forward.

        layers: those whose hidden states are wanted, rising from 1. Without continuations the
        forward ends for this prompt after the last of them.
        num_shared: first tokens that later prompts will have too; they are computed once.
        is_pinned: whether these are kept for good.
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
        )
        end = await _last_event(stream)
        if not isinstance(end, ScoredEvent):
            raise _as_error(end)
        return Scores(end.logprobs, stream.num_cached, end.hidden_states)

    async def prefill(self, prompt_ids: list[int]) -> int | None:
        """Computes the prompt, so that a sequence that begins with it starts sooner.

        Returns how many of its tokens were known already; None, and nothing is computed, if it is
        too long to be kept. A cancelled call frees its slot.

        Raises:
            EngineClosedError: the engine is closing.
        """
        if not self._runner.is_kept(len(prompt_ids)):
            return None
        stream = self._start(prompt_ids, None)
        end = await _last_event(stream)
        if not isinstance(end, PrefilledEvent):
            raise _as_error(end)
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
        """Sequences that are computed together now."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for others to end."""
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
    ) -> TokenStream:
        loop = asyncio.get_running_loop()
        sequence = Sequence(
            prompt_ids,
            params,
            list(continuations),
            lambda event: _deliver(loop, stream, event),
            layers,
            num_shared,
            is_pinned,
        )
        stream = TokenStream(lambda: self._abort(sequence), lambda: sequence.num_cached or 0)
        with self._lock:
            if self._is_closed:
                raise EngineClosedError
            self._commands.put(("add", sequence))
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
            return  # whoever was to run has failed
        results = self._compute(chunks)
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
        for sequence, result in results.items():
            self._postprocess(sequence, result)

    def _compute(self, chunks: list[ScheduledChunk]) -> dict[Sequence, StepResult | Exception]:
        """One step of the runner; if it fails, one for each chunk, so that only the guilty does."""
        try:
            return self._runner.step(chunks)
        except Exception as error:
            if len(chunks) == 1:
                return {chunks[0].sequence: error}
            logger.warning("a step of %d sequences failed; each is tried alone", len(chunks))
            return {
                sequence: result
                for chunk in chunks
                for sequence, result in self._compute([chunk]).items()
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


class _Memory:
    """The runner's memory as the scheduler sees it: who breaks it is ended."""

    def __init__(self, runner: Runner, end: Callable[[Sequence, Event], None]) -> None:
        self._runner, self._end = runner, end

    def admit(self, sequence: Sequence) -> bool:
        try:
            num_known = self._runner.admit(sequence)
        except Exception as error:
            return self._failed(sequence, error)
        if num_known is None:
            return False
        sequence.num_computed = num_known
        if sequence.num_cached is None:
            sequence.num_cached = num_known
            sequence.context.run(note_queue, time.perf_counter() - sequence.last_event_at)
        return True

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        try:
            return self._runner.reserve(sequence, num_tokens)
        except Exception as error:
            return self._failed(sequence, error)

    def suspend(self, sequence: Sequence) -> None:
        try:
            self._runner.suspend(sequence)
        except Exception as error:
            self._failed(sequence, error)
        sequence.num_computed = 0

    def _failed(self, sequence: Sequence, error: Exception) -> bool:
        sequence.context.run(logger.error, "no memory could be had for a sequence", exc_info=error)
        self._end(sequence, FailedEvent(error))
        return False


def _deliver(loop: asyncio.AbstractEventLoop, stream: TokenStream, event: Event) -> None:
    try:
        loop.call_soon_threadsafe(stream.events.put_nowait, event)
    except RuntimeError:
        # The loop has closed, and with it everyone who could read this.
        logger.debug("no event loop left to deliver %s", event)


async def _last_event(stream: TokenStream) -> Event:
    """Waits for the end of a sequence that yields no tokens; leaving early aborts it."""
    try:
        return await stream.events.get()
    finally:
        stream.abort()


def _as_error(event: Event) -> BaseException:
    assert not isinstance(event, TokenEvent)
    return event.error if isinstance(event, FailedEvent) else SequenceAbortedError()
