"""An engine that requests tokens from the upstream server, on a thread with its own event loop.

Any thread and any event loop may call it, as with the local engine.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection
from contextlib import aclosing, suppress
from typing import Any

from server.core.concurrency import all_of
from server.core.engine.adapters import BASE, Adapter
from server.core.engine.admission import Admission
from server.core.engine.engine import Observer, Scores
from server.core.engine.sequence import (
    AbortedEvent,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    PrefilledEvent,
    SamplingParams,
    ScoredEvent,
    Sequence,
    Terminal,
    TokenEvent,
)
from server.core.engine.stream import EngineClosedError, TokenStream
from server.core.engine.work import Work
from server.errors import APIError, EngineFailedError
from server.remote.scoring import Batch, Beginning, batches, sums
from server.remote.upstream import Address, Upstream
from server.remote.wire import (
    UpstreamFormatError,
    check_params,
    continuation_body,
    logprobs_of,
    num_cached_in,
    prefill_body,
    reason_of,
    scoring_body,
    tokens_of,
)

logger = logging.getLogger(__name__)

# Between two health checks of the upstream server.
WATCH_INTERVAL_S = 2.0
CLOSE_TIMEOUT_S = 5.0


class RemoteEngine:
    """Runs each sequence as requests to the upstream server; an `Engine`.

    At most `max_num_seqs` sequences run at once. The remaining ones wait here, and the request with
    the fewest running sequences is served next; the upstream would serve them in order of arrival.
    """

    has_hidden_states = False
    breakdown = None  # the upstream server may recover
    num_kv_tokens = None

    def __init__(self, address: Address, model: str, *, max_num_seqs: int) -> None:
        """model: its name in the upstream server."""
        self._address, self._model, self._upstream = address, model, Upstream(address)
        self._admission = Admission(max_num_seqs, _Starter(self._begin))
        self._tasks: dict[Sequence, asyncio.Task[None]] = {}
        self._observer: Observer | None = None
        self._trouble: str | None = None
        self._is_closed, self._lock = False, threading.Lock()
        self._loop, self._closing = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="remote engine", daemon=True)
        self._thread.start()

    # --- called from any thread -------------------------------------------------------

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, *, work: Work | None = None,
        adapter: Adapter = BASE,
    ) -> TokenStream:  # fmt: skip
        check_params(params)
        return self._start(Sequence(prompt_ids, params, work=work or Work(), adapter=adapter))

    async def score(
        self,
        prompt_ids: list[int],
        continuations: list[list[int]],
        *,
        layers: tuple[int, ...] = (),
        num_shared: int = 0,
        is_pinned: bool = False,
        work: Work | None = None,
        adapter: Adapter = BASE,
    ) -> Scores:
        """num_shared, is_pinned: ignored; the upstream manages its own prefix cache."""
        assert not layers, "an upstream server returns no hidden states"
        sequence = Sequence(
            prompt_ids, continuations=continuations, work=work or Work(), adapter=adapter
        )
        stream = self._start(sequence)
        end = await stream.end(ScoredEvent)
        return Scores(end.logprobs, stream.num_cached)

    async def prefill(
        self, prompt_ids: list[int], *, work: Work | None = None, adapter: Adapter = BASE
    ) -> int | None:
        stream = self._start(Sequence(prompt_ids, work=work or Work(), adapter=adapter))
        await stream.end(PrefilledEvent)
        return stream.num_cached

    def observe(self, observer: Observer) -> None:
        self._observer = observer

    @property
    def is_alive(self) -> bool:
        return not self._is_closed and self._trouble is None

    @property
    def trouble(self) -> str | None:
        return None if self._trouble is None else f"{self._address.url}: {self._trouble}"

    @property
    def num_running(self) -> int:
        return len(self._admission.running)

    @property
    def num_waiting(self) -> int:
        return len(self._admission.waiting)

    def close(self) -> None:
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(CLOSE_TIMEOUT_S)

    def _start(self, sequence: Sequence) -> TokenStream:
        stream = TokenStream(lambda: self._abort(sequence), lambda: sequence.num_cached)
        sequence.deliver = stream.deliver
        with self._lock:  # no sequence may start after `close`
            if self._is_closed:
                raise EngineClosedError
            self._loop.call_soon_threadsafe(self._add, sequence)
        return stream

    def _abort(self, sequence: Sequence) -> None:
        """May be called from any thread, repeatedly, and after `close`."""
        with suppress(RuntimeError):  # the loop is closed, so all sequences have ended
            self._loop.call_soon_threadsafe(self._end, sequence, AbortedEvent())

    # --- on the thread ----------------------------------------------------------------

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        watching = asyncio.create_task(self._watch())
        await self._closing.wait()
        tasks = [watching, *self._tasks.values()]
        watching.cancel()
        for sequence in [*self._admission.waiting, *self._admission.running]:
            self._end(sequence, AbortedEvent())
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._upstream.close()

    async def _watch(self) -> None:
        while True:
            trouble = await self._upstream.trouble()
            if trouble != self._trouble:
                reason = trouble or "it works again"
                logger.warning("the engine at %s: %s", self._address.url, reason)
            self._trouble = trouble
            await asyncio.sleep(WATCH_INTERVAL_S)

    def _add(self, sequence: Sequence) -> None:
        self._admission.add(sequence)
        self._admission.admit_waiting(step=0)

    def _begin(self, sequence: Sequence) -> None:
        """Called when the sequence is admitted."""
        self._tasks[sequence] = self._loop.create_task(
            self._compute(sequence), context=sequence.context
        )

    async def _compute(self, sequence: Sequence) -> None:
        self._end(sequence, await self._terminal_event(sequence))

    async def _terminal_event(self, sequence: Sequence) -> Terminal:
        """Runs the sequence; returns its terminal event unless it is aborted."""
        try:
            if sequence.params is not None:
                return await self._continue(sequence, sequence.params)
            if sequence.is_scored:
                return await self._score(sequence)
            answer = await self._upstream.answer(self._named(prefill_body(sequence.prompt_ids)))
            sequence.num_cached = num_cached_in(answer)
            return PrefilledEvent()
        except UpstreamFormatError as error:
            logger.error("the engine's answer cannot be used: %s", error)
            return FailedEvent(EngineFailedError())
        except APIError as error:
            return FailedEvent(error)
        except Exception as error:
            logger.exception("a sequence failed")
            return FailedEvent(error)

    async def _continue(self, sequence: Sequence, params: SamplingParams) -> FinishedEvent:
        body = self._named(continuation_body(sequence.prompt_ids, params))
        reason: FinishReason | None = None
        async with aclosing(self._upstream.events(body)) as events:
            async for event in events:
                sequence.num_cached = num_cached_in(event)
                for choice in event.get("choices", ()):
                    is_stopped = self._deliver(sequence, tokens_of(choice, params), params)
                    reason = FinishReason.STOP if is_stopped else reason_of(choice) or reason
        if reason is None:
            raise UpstreamFormatError("a choice ends without a finish reason")
        return FinishedEvent(reason)

    def _deliver(
        self, sequence: Sequence, tokens: list[TokenEvent], params: SamplingParams
    ) -> bool:
        """Delivers the tokens up to a stop token; returns whether there is one."""
        for token in tokens:
            if token.token_id in params.stop_token_ids:
                return True
            if self._observer is not None:
                now, is_first = time.perf_counter(), not sequence.completion_ids
                self._observer.token_sampled(now - sequence.last_event_at, is_first=is_first)
                sequence.last_event_at = now
            sequence.completion_ids.append(token.token_id)
            sequence.deliver(token)
        return False

    async def _score(self, sequence: Sequence) -> ScoredEvent:
        prompt_ids, continuations = sequence.prompt_ids, sequence.continuations
        logprobs: dict[tuple[Beginning, int], float] = {}

        async def run(batch: Batch) -> int | None:
            prompts = [[*prompt_ids, *beginning] for beginning in batch.beginnings]
            body = self._named(scoring_body(prompts, list(batch.token_ids)))
            answer = await self._upstream.answer(body)
            for beginning, by_id in zip(batch.beginnings, logprobs_of(answer, body), strict=True):
                logprobs.update({(beginning, i): logprob for i, logprob in by_id.items()})
            return num_cached_in(answer)

        first, *rest = batches(continuations, len(prompt_ids) + max(map(len, continuations)))
        sequence.num_cached = await run(first)
        await all_of(map(run, rest))
        return ScoredEvent(sums(continuations, logprobs))

    def _named(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"model": self._model, **body}

    def _end(self, sequence: Sequence, event: Terminal) -> None:
        """Ends the sequence once: closes its requests and delivers exactly one terminal event."""
        if not self._admission.remove(sequence):
            return
        task = self._tasks.pop(sequence, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        if self._observer is not None:
            self._observer.sequence_ended(sequence)
        sequence.deliver(event)
        if not self._closing.is_set():
            self._admission.admit_waiting(step=0)


class _Starter:
    """An `Allocator` that admits every sequence: the upstream server manages memory."""

    def __init__(self, begin: Callable[[Sequence], None]) -> None:
        self._begin = begin

    def admit(self, sequence: Sequence) -> bool:
        if sequence.work.queue_s is None:
            sequence.work.queue_s = time.perf_counter() - sequence.last_event_at
        self._begin(sequence)
        return True

    def fits(self, sequence: Sequence, without: Collection[Sequence]) -> bool:
        return True

    def reserve(self, sequence: Sequence) -> bool:
        return True

    def suspend(self, sequence: Sequence) -> None:
        raise AssertionError("reserve() never fails, so no sequence is suspended")
