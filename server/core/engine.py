"""The one thread that owns the model: submit, score, abort, close.

Knows token ids, not text and not sentiment. The public methods belong to the event loop;
everything below runs on the engine's thread, so the loop is never blocked.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from server.core.scheduler import ScheduledChunk, Scheduler
from server.core.sequence import (
    TERMINAL,
    AbortedEvent,
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    SamplingParams,
    ScoredEvent,
    Sequence,
    TokenEvent,
)

logger = logging.getLogger(__name__)


class EngineClosedError(Exception):
    """The engine takes no more sequences."""


class SequenceAbortedError(Exception):
    """The sequence was aborted before it was done."""


@dataclass(frozen=True)
class StepResult:
    """What one sequence got out of a step: a sampled token, or the scores it asked for."""

    token_id: int | None = None
    logprobs: list[float] | None = None


class Runner(Protocol):
    """What the engine needs of a model runner."""

    def step(self, chunks: list[ScheduledChunk]) -> dict[Sequence, StepResult | Exception]:
        """Computes the chunks; a result, or what went wrong, for every finished prompt."""

    def release(self, sequence: Sequence) -> None:
        """Frees what the sequence held. Harmless if it held nothing."""


class TokenStream:
    """The tokens of one submitted sequence, for one reader.

    `finish_reason` is set once the iteration has ended by itself.
    """

    def __init__(self, abort: Callable[[], None]) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.finish_reason: FinishReason | None = None
        self.abort = abort

    async def __aiter__(self) -> AsyncIterator[int]:
        while True:
            match await self.events.get():
                case TokenEvent(token_id):
                    yield token_id
                case FinishedEvent(reason):
                    self.finish_reason = reason
                    return
                case event:
                    raise _as_error(event)


class Engine:
    """Runs sequences in continuous batches on a thread of its own."""

    def __init__(self, runner: Runner, *, max_num_seqs: int, max_prefill_tokens: int) -> None:
        self._runner = runner
        self._scheduler = Scheduler(max_num_seqs, max_prefill_tokens)
        # A sequence to add, a sequence to abort, or None to close.
        self._commands: queue.SimpleQueue[tuple[str, Sequence] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # no sequence may slip in behind the closing command
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, prompt_ids: list[int], params: SamplingParams) -> TokenStream:
        """Starts to continue the prompt. Call from the event loop.

        Raises:
            EngineClosedError: the engine is closing.
        """
        assert prompt_ids and params.max_tokens > 0
        loop = asyncio.get_running_loop()
        sequence = Sequence(prompt_ids, params, [], lambda event: _deliver(loop, stream, event))
        stream = TokenStream(lambda: self._abort(sequence))
        self._add(sequence)
        return stream

    async def score(self, prompt_ids: list[int], continuations: list[list[int]]) -> list[float]:
        """Log-probability (nats) of each continuation after the prompt, in one forward.

        A cancelled call frees its slot.

        Raises:
            EngineClosedError: the engine is closing.
        """
        assert prompt_ids and continuations and all(continuations)
        loop = asyncio.get_running_loop()
        sequence = Sequence(
            prompt_ids, None, continuations, lambda event: _deliver(loop, stream, event)
        )
        stream = TokenStream(lambda: self._abort(sequence))
        self._add(sequence)
        try:
            match await stream.events.get():
                case ScoredEvent(logprobs):
                    return logprobs
                case event:
                    raise _as_error(event)
        finally:
            stream.abort()

    @property
    def is_alive(self) -> bool:
        """Whether the engine still works on sequences."""
        return self._thread.is_alive() and not self._is_closed

    def close(self) -> None:
        """Aborts every sequence and ends the thread. May be called twice."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._commands.put(None)
        self._thread.join()

    def _add(self, sequence: Sequence) -> None:
        with self._lock:
            if self._is_closed:
                raise EngineClosedError("the engine is closed")
            self._commands.put(("add", sequence))

    def _abort(self, sequence: Sequence) -> None:
        """Ends the sequence if it still runs. Any thread, any number of times."""
        self._commands.put(("abort", sequence))

    # --- below: the engine's thread -------------------------------------------------

    def _run(self) -> None:
        while self._take_commands():
            self._step()
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            self._end(sequence, AbortedEvent())

    def _take_commands(self) -> bool:
        """Waits for work, then takes all commands there are. False: close."""
        while True:
            try:
                command = self._commands.get(block=self._scheduler.is_idle)
            except queue.Empty:
                return True
            match command:
                case None:
                    return False
                case ("add", sequence):
                    self._scheduler.add(sequence)
                case (_, sequence):
                    self._end(sequence, AbortedEvent())

    def _step(self) -> None:
        chunks = self._scheduler.schedule()
        try:
            results = self._runner.step(chunks)
        except Exception as error:
            # The step is lost for all; which sequence broke it cannot be told.
            logger.exception("a step of %d sequences failed", len(chunks))
            for chunk in chunks:
                self._end(chunk.sequence, FailedEvent(error))
            return
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
        for sequence, result in results.items():
            self._postprocess(sequence, result)

    def _postprocess(self, sequence: Sequence, result: StepResult | Exception) -> None:
        if isinstance(result, Exception):
            logger.error("a sequence failed", exc_info=result)
            self._end(sequence, FailedEvent(result))
            return
        if result.logprobs is not None:
            self._end(sequence, ScoredEvent(result.logprobs))
            return
        params, token_id = sequence.params, result.token_id
        assert params is not None and token_id is not None
        if token_id in params.stop_token_ids:
            self._end(sequence, FinishedEvent(FinishReason.STOP))
            return
        sequence.completion_ids.append(token_id)
        sequence.deliver(TokenEvent(token_id))
        if len(sequence.completion_ids) >= params.max_tokens:
            self._end(sequence, FinishedEvent(FinishReason.LENGTH))

    def _end(self, sequence: Sequence, event: Event) -> None:
        """The one way out: frees the slot and delivers exactly one terminal event."""
        if self._scheduler.remove(sequence):
            self._runner.release(sequence)
            sequence.deliver(event)


def _deliver(loop: asyncio.AbstractEventLoop, stream: TokenStream, event: Event) -> None:
    try:
        loop.call_soon_threadsafe(stream.events.put_nowait, event)
    except RuntimeError:
        # The loop has closed, and with it everyone who could read this.
        logger.debug("no event loop left to deliver %s", event)


def _as_error(event: Event) -> BaseException:
    assert isinstance(event, TERMINAL)
    return event.error if isinstance(event, FailedEvent) else SequenceAbortedError()
