"""The engine with a fake runner: every sequence ends once, whatever happens to it."""

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import TypeVar

import numpy as np
import pytest

from server.core.engine.engine import Scores
from server.core.engine.local import LocalEngine
from server.core.engine.runner import StepInterruptedError, StepResult
from server.core.engine.scheduler import ScheduledChunk
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
    Terminal,
    TokenEvent,
)
from server.core.engine.stream import EngineClosedError, SequenceAbortedError, TokenStream
from server.core.engine.work import Work

T = TypeVar("T")

BOUND_S = 20
ENDLESS = SamplingParams(max_tokens=10**9)


class FakeRunner:
    """Samples 100, 101, 102, … and scores 0, -1, -2, …, unless a test sets other answers.

    The hidden state after layer n is [n, length of the prompt].

    `before_step` is called on the engine's thread with the number of the step, from 1 on.
    """

    num_kv_tokens = 0

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.before_step: Callable[[int], None] = lambda number: None
        self.answers: dict[int, Callable[[Sequence], StepResult | Exception]] = {}
        self.steps: list[list[int]] = []
        self.ran: set[Sequence] = set()
        self.released: list[Sequence] = []
        self.thread_ids: set[int] = set()
        self.num_rests, self.rested = 0, threading.Event()

    def step(
        self, chunks: list[ScheduledChunk], should_stop: Callable[[], bool] = lambda: False
    ) -> dict[Sequence, StepResult | Exception]:
        assert chunks, "a step without work"
        self._let_readers_catch_up()
        self.thread_ids.add(threading.get_ident())
        self.ran.update(chunk.sequence for chunk in chunks)
        self.steps.append([chunk.sequence.prompt_ids[0] for chunk in chunks])
        self.before_step(len(self.steps))
        return {chunk.sequence: self._answer(chunk.sequence) for chunk in chunks if chunk.is_last}

    def admit(self, sequence: Sequence) -> int | None:
        return 0

    def reserve(self, sequence: Sequence) -> bool:
        return True

    def fits(self, sequence: Sequence, without: Collection[Sequence]) -> bool:
        return True

    def suspend(self, sequence: Sequence) -> None:
        raise AssertionError("there is room for all")

    def release(self, sequence: Sequence, *, is_sound: bool) -> None:
        self.thread_ids.add(threading.get_ident())
        self.released.append(sequence)

    def is_kept(self, num_tokens: int) -> bool:
        return num_tokens < 1000

    def rest(self) -> None:
        self.thread_ids.add(threading.get_ident())
        self.num_rests += 1
        self.rested.set()

    def _let_readers_catch_up(self) -> None:
        # A step that takes no time would flood the event loop faster than it can read.
        if self.loop is not None:
            caught_up = threading.Event()
            self.loop.call_soon_threadsafe(caught_up.set)
            assert caught_up.wait(BOUND_S), "the event loop is blocked"

    def _answer(self, sequence: Sequence) -> StepResult | Exception:
        if sequence.prompt_ids[0] in self.answers:
            return self.answers[sequence.prompt_ids[0]](sequence)
        if sequence.is_scored:
            logprobs = [-float(i) for i in range(len(sequence.continuations))]
            states = [[layer, len(sequence.prompt_ids)] for layer in sequence.layers]
            return ScoredEvent(logprobs, np.array(states, np.float32) if states else None)
        if sequence.params is None:
            return PrefilledEvent()
        return [TokenEvent(100 + len(sequence.completion_ids))]


class Hold:
    """Holds the engine in one step until the test releases it. Use as `before_step`."""

    def __init__(self, number: int = 1) -> None:
        self._number = number
        self._reached, self._free = threading.Event(), threading.Event()

    def __call__(self, number: int) -> None:
        if number == self._number:
            self._reached.set()
            assert self._free.wait(BOUND_S), "the test never released the step"

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, BOUND_S)

    def release(self) -> None:
        self._free.set()


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@asynccontextmanager
async def running(
    runner: FakeRunner, *, max_num_seqs: int = 4, max_rows: int = 8
) -> AsyncIterator[LocalEngine]:
    runner.loop = asyncio.get_running_loop()
    engine = LocalEngine(runner, max_num_seqs=max_num_seqs, max_rows=max_rows)
    try:
        yield engine
    finally:
        if isinstance(runner.before_step, Hold):
            runner.before_step.release()
        await bounded(asyncio.to_thread(engine.close))


async def bounded(awaitable: Awaitable[T]) -> T:
    """The result; fails a test that would hang."""
    return await asyncio.wait_for(awaitable, BOUND_S)


async def tokens_of(stream: TokenStream) -> list[int]:
    async def read() -> list[int]:
        return [token.token_id async for token in stream]

    return await bounded(read())


async def first_token(stream: TokenStream) -> None:
    event = await bounded(stream.events.get())
    assert isinstance(event, TokenEvent)
    stream.events.put_nowait(event)


async def events_of(engine: LocalEngine, *streams: TokenStream) -> list[list[Event]]:
    """Closes the engine and returns the events of each stream that were not read."""
    await bounded(asyncio.to_thread(engine.close))
    delivered = asyncio.Event()
    # After everything that the engine's thread has passed to the loop.
    asyncio.get_running_loop().call_soon(delivered.set)
    await bounded(delivered.wait())
    return [
        [stream.events.get_nowait() for _ in range(stream.events.qsize())] for stream in streams
    ]


def tokens(*token_ids: int) -> list[Event]:
    return [TokenEvent(token_id) for token_id in token_ids]


# --- how a sequence ends --------------------------------------------------------------


async def test_a_sequence_ends_at_max_tokens(runner: FakeRunner) -> None:
    async with running(runner) as engine:
        stream = engine.submit([1, 2, 3], SamplingParams(max_tokens=3))
        assert await tokens_of(stream) == [100, 101, 102]
        assert stream.finish_reason is FinishReason.LENGTH


async def test_a_stop_token_ends_a_sequence_and_is_not_delivered(runner: FakeRunner) -> None:
    async with running(runner) as engine:
        params = SamplingParams(max_tokens=50, stop_token_ids=frozenset({7, 102}))
        stream = engine.submit([1], params)
        assert await tokens_of(stream) == [100, 101]
        assert stream.finish_reason is FinishReason.STOP


async def test_a_stop_token_in_place_of_the_last_token_is_a_stop(runner: FakeRunner) -> None:
    async with running(runner) as engine:
        params = SamplingParams(max_tokens=3, stop_token_ids=frozenset({102}))
        stream = engine.submit([1], params)
        assert await tokens_of(stream) == [100, 101]
        assert stream.finish_reason is FinishReason.STOP


async def test_a_stop_token_at_once_gives_an_empty_reply(runner: FakeRunner) -> None:
    async with running(runner) as engine:
        params = SamplingParams(max_tokens=3, stop_token_ids=frozenset({100}))
        stream = engine.submit([1], params)
        assert await tokens_of(stream) == []
        assert stream.finish_reason is FinishReason.STOP


async def test_a_finished_sequence_got_its_tokens_and_one_terminal_event(
    runner: FakeRunner,
) -> None:
    async with running(runner) as engine:
        runner.before_step = hold = Hold(number=40)
        length = engine.submit([1] * 20, SamplingParams(max_tokens=2))
        stop_params = SamplingParams(max_tokens=9, stop_token_ids=frozenset({101}))
        stop = engine.submit([2], stop_params)
        engine.submit([3], ENDLESS)
        await hold.reached()
        hold.release()
        assert await events_of(engine, length, stop) == [
            [*tokens(100, 101), FinishedEvent(FinishReason.LENGTH)],
            [*tokens(100), FinishedEvent(FinishReason.STOP)],
        ]


async def test_a_score_returns_the_logprobs_in_order(runner: FakeRunner) -> None:
    async with running(runner) as engine:
        assert (await bounded(engine.score([1, 2], [[5], [6], [7, 8]]))).logprobs == [
            0.0,
            -1.0,
            -2.0,
        ]


async def test_a_long_prompt_is_scored_once_it_is_complete(runner: FakeRunner) -> None:
    async with running(runner, max_rows=4) as engine:
        assert (await bounded(engine.score([1] * 11, [[5], [6]]))).logprobs == [0.0, -1.0]
        assert runner.steps == [[1]] * 3


@pytest.mark.parametrize("continuations", [[], [[5], [6, 7]]])
async def test_a_score_returns_the_hidden_states_of_its_layers(
    runner: FakeRunner, continuations: list[list[int]]
) -> None:
    async with running(runner, max_rows=2) as engine:
        scores = await bounded(engine.score([1, 2, 3], continuations, layers=(2, 5)))
        assert scores.logprobs == [0.0, -1.0][: len(continuations)]
        assert scores.hidden_states is not None
        assert scores.hidden_states.tolist() == [[2, 3], [5, 3]]


async def test_a_score_without_layers_has_no_hidden_states(runner: FakeRunner) -> None:
    async with running(runner) as engine:
        assert (await bounded(engine.score([1], [[5]]))).hidden_states is None


async def test_a_score_of_nothing_is_refused(runner: FakeRunner) -> None:
    async with running(runner) as engine:
        with pytest.raises(AssertionError):
            await bounded(engine.score([1], []))
        with pytest.raises(AssertionError):
            await bounded(engine.score([1], [[]], layers=(1,)))
    assert not runner.ran


async def test_the_arguments_of_a_score_reach_the_runner(runner: FakeRunner) -> None:
    async with running(runner) as engine:
        await bounded(engine.score([1, 2], [], layers=(3,), num_shared=1, is_pinned=True))
        await bounded(engine.score([2, 2], [[5]], layers=(3,)))
        await bounded(engine.prefill([3, 2]))
    shallow, scored, prefilled = sorted(runner.released, key=lambda each: each.prompt_ids)
    assert (shallow.layers, shallow.num_shared, shallow.is_pinned) == ((3,), 1, True)
    assert (scored.layers, scored.continuations, scored.num_shared) == ((3,), [[5]], 0)
    assert (prefilled.layers, prefilled.is_scored) == ((), False)


@pytest.mark.parametrize(
    ("layers", "continuations", "depth", "is_scored"),
    [
        ((), [], None, False),
        ((), [[5]], None, True),
        ((2, 4), [], 4, True),
        ((2, 4), [[5]], None, True),
    ],
)
def test_a_sequence_leaves_after_its_last_layer_unless_it_has_continuations(
    layers: tuple[int, ...], continuations: list[list[int]], depth: int | None, is_scored: bool
) -> None:
    sequence = Sequence([1], None, continuations, lambda event: None, layers)
    assert (sequence.depth, sequence.is_scored) == (depth, is_scored)


# --- abort ----------------------------------------------------------------------------


async def test_abort_while_waiting_ends_a_sequence_that_never_ran(runner: FakeRunner) -> None:
    runner.before_step = hold = Hold()
    async with running(runner, max_num_seqs=1) as engine:
        first = engine.submit([1], SamplingParams(max_tokens=2))
        waiting = engine.submit([2], ENDLESS)
        await hold.reached()
        waiting.abort()
        hold.release()
        assert await tokens_of(first) == [100, 101]
        assert (await events_of(engine, waiting)) == [[AbortedEvent()]]
        assert [2] not in runner.steps


async def test_abort_during_prefill_ends_a_sequence_and_frees_its_slot(runner: FakeRunner) -> None:
    runner.before_step = hold = Hold(number=2)
    async with running(runner, max_num_seqs=1, max_rows=2) as engine:
        long = engine.submit([1] * 100, ENDLESS)
        other = engine.submit([2], SamplingParams(max_tokens=1))
        await hold.reached()
        long.abort()
        hold.release()
        assert await tokens_of(other) == [100]
        assert runner.steps == [[1], [1], [2]]
        assert [sequence.prompt_ids[0] for sequence in runner.released] == [1, 2]
        assert await events_of(engine, long) == [[AbortedEvent()]]


async def test_abort_during_decode_ends_a_sequence_after_the_token_of_that_step(
    runner: FakeRunner,
) -> None:
    runner.before_step = hold = Hold(number=3)
    async with running(runner) as engine:
        stream = engine.submit([1], ENDLESS)
        await hold.reached()
        stream.abort()
        hold.release()
        assert await events_of(engine, stream) == [[*tokens(100, 101, 102), AbortedEvent()]]
        assert len(runner.steps) == 3


async def test_reading_an_aborted_sequence_raises(runner: FakeRunner) -> None:
    async with running(runner) as engine:
        stream = engine.submit([1], ENDLESS)
        await first_token(stream)
        stream.abort()
        with pytest.raises(SequenceAbortedError):
            await tokens_of(stream)
        assert stream.finish_reason is None


async def test_abort_twice_is_harmless(runner: FakeRunner) -> None:
    runner.before_step = hold = Hold(number=2)
    async with running(runner) as engine:
        stream = engine.submit([1], ENDLESS)
        await hold.reached()
        stream.abort()
        stream.abort()
        hold.release()
        assert await events_of(engine, stream) == [[*tokens(100, 101), AbortedEvent()]]
        assert len(runner.released) == 1


async def test_abort_after_the_end_is_harmless(runner: FakeRunner) -> None:
    async with running(runner) as engine:
        stream = engine.submit([1], SamplingParams(max_tokens=1))
        other = engine.submit([2], SamplingParams(max_tokens=5))
        assert await tokens_of(other) == [100, 101, 102, 103, 104]
        stream.abort()
        assert await events_of(engine, stream) == [
            [*tokens(100), FinishedEvent(FinishReason.LENGTH)]
        ]
        assert len(runner.released) == 2


async def test_abort_works_from_any_thread(runner: FakeRunner) -> None:
    async with running(runner) as engine:
        stream = engine.submit([1], ENDLESS)
        await first_token(stream)
        await asyncio.to_thread(stream.abort)
        with pytest.raises(SequenceAbortedError):
            await tokens_of(stream)


async def test_abort_after_close_is_harmless(runner: FakeRunner) -> None:
    async with running(runner) as engine:
        stream = engine.submit([1], ENDLESS)
        await first_token(stream)
        await bounded(asyncio.to_thread(engine.close))
        stream.abort()
        (events,) = await events_of(engine, stream)
        assert events[-1] == AbortedEvent() and events.count(AbortedEvent()) == 1


# --- score ----------------------------------------------------------------------------


async def test_a_cancelled_score_frees_its_slot_in_the_middle_of_its_prefill(
    runner: FakeRunner,
) -> None:
    runner.before_step = hold = Hold(number=2)
    async with running(runner, max_num_seqs=1, max_rows=2) as engine:
        score = asyncio.create_task(engine.score([1] * 100, [[5], [6]]))
        await hold.reached()
        score.cancel()
        with pytest.raises(asyncio.CancelledError):
            await bounded(score)
        hold.release()
        assert await tokens_of(engine.submit([2], SamplingParams(max_tokens=1))) == [100]
        # The score was not run to its end first.
        assert runner.steps.count([1]) < 50
        assert Counter(runner.released) == Counter(runner.ran)


async def test_a_cancelled_score_that_waits_never_runs(runner: FakeRunner) -> None:
    runner.before_step = hold = Hold()
    async with running(runner, max_num_seqs=1) as engine:
        first = engine.submit([1], SamplingParams(max_tokens=2))
        await hold.reached()
        score = asyncio.create_task(engine.score([2], [[5], [6]]))
        third = asyncio.create_task(engine.score([3], [[5]]))
        yielded = asyncio.Event()
        asyncio.get_running_loop().call_soon(yielded.set)
        await yielded.wait()  # both have been submitted now
        score.cancel()
        with pytest.raises(asyncio.CancelledError):
            await bounded(score)
        hold.release()
        assert await tokens_of(first) == [100, 101]
        assert (await bounded(third)).logprobs == [0.0]
        assert runner.steps == [[1], [1], [3]]


async def test_a_cancelled_score_of_hidden_states_frees_its_slot(runner: FakeRunner) -> None:
    runner.before_step = hold = Hold(number=2)
    async with running(runner, max_num_seqs=1, max_rows=2) as engine:
        score = asyncio.create_task(engine.score([1] * 100, [], layers=(1,)))
        await hold.reached()
        score.cancel()
        with pytest.raises(asyncio.CancelledError):
            await bounded(score)
        hold.release()
        assert await tokens_of(engine.submit([2], SamplingParams(max_tokens=1))) == [100]
        assert runner.steps.count([1]) < 50
        assert Counter(runner.released) == Counter(runner.ran)


async def test_a_score_that_is_aborted_by_closing_raises(runner: FakeRunner) -> None:
    runner.before_step = hold = Hold()
    async with running(runner, max_rows=2) as engine:
        score = asyncio.create_task(engine.score([1] * 10**6, [[5]]))
        await hold.reached()
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        hold.release()
        with pytest.raises(SequenceAbortedError):
            await bounded(score)
        await bounded(closing)


# --- failures of the runner -----------------------------------------------------------


async def test_a_failing_sequence_does_not_affect_others(runner: FakeRunner) -> None:
    error = ValueError("bad logits")
    runner.answers[2] = lambda sequence: error
    async with running(runner) as engine:
        good = engine.submit([1], SamplingParams(max_tokens=4))
        bad = engine.submit([2], SamplingParams(max_tokens=4))
        with pytest.raises(ValueError, match="bad logits"):
            await tokens_of(bad)
        assert bad.finish_reason is None
        assert await tokens_of(good) == [100, 101, 102, 103]


async def test_several_tokens_of_a_step_come_in_order_and_end_the_sequence_once(
    runner: FakeRunner,
) -> None:
    runner.answers[1] = lambda sequence: [TokenEvent(5), TokenEvent(6), TokenEvent(7)]
    async with running(runner) as engine:
        stream = engine.submit([1], SamplingParams(max_tokens=3))
        assert await tokens_of(stream) == [5, 6, 7]
        assert stream.finish_reason is FinishReason.LENGTH
        stopped = engine.submit([1], SamplingParams(max_tokens=9, stop_token_ids=frozenset({7})))
        assert await tokens_of(stopped) == [5, 6]
        assert stopped.finish_reason is FinishReason.STOP
    assert len(runner.steps) == 2
    # Of the tokens after the prompt all but the last are computed.
    assert [sequence.num_computed for sequence in runner.released] == [3, 3]


async def test_a_sequence_that_fails_later_keeps_its_tokens_and_fails_once(
    runner: FakeRunner,
) -> None:
    error = ValueError("bad logits")

    def fail_at_third(sequence: Sequence) -> StepResult | Exception:
        return error if len(sequence.completion_ids) == 2 else [TokenEvent(5)]

    runner.answers[1] = fail_at_third
    async with running(runner) as engine:
        stream = engine.submit([1], ENDLESS)
        assert await tokens_of(engine.submit([2], SamplingParams(max_tokens=6)))
        assert await events_of(engine, stream) == [[*tokens(5, 5), FailedEvent(error)]]


async def test_a_failing_score_raises_the_error_of_the_runner(runner: FakeRunner) -> None:
    runner.answers[1] = lambda sequence: ValueError("not finite")
    async with running(runner) as engine:
        with pytest.raises(ValueError, match="not finite"):
            await bounded(engine.score([1], [[5], [6]]))
        assert (await bounded(engine.score([2], [[5], [6]]))).logprobs == [0.0, -1.0]


async def test_hidden_states_that_are_not_finite_fail_their_sequence_only(
    runner: FakeRunner,
) -> None:
    runner.answers[1] = lambda sequence: ValueError("not finite")
    async with running(runner) as engine:
        broken, healthy, stream = (
            asyncio.create_task(engine.score([1, 2], [], layers=(1,))),
            asyncio.create_task(engine.score([2, 2], [], layers=(1,))),
            engine.submit([3], SamplingParams(max_tokens=3)),
        )
        with pytest.raises(ValueError, match="not finite"):
            await bounded(broken)
        scores = await bounded(healthy)
        assert scores.hidden_states is not None and scores.hidden_states.tolist() == [[1, 2]]
        assert await tokens_of(stream) == [100, 101, 102]
        assert engine.is_alive


async def test_a_step_that_fails_is_tried_again_and_loses_nothing(runner: FakeRunner) -> None:
    def fail(number: int) -> None:
        if number == 3:
            raise RuntimeError("out of memory")

    runner.before_step = fail
    async with running(runner) as engine:
        streams = [engine.submit([i], SamplingParams(max_tokens=5)) for i in (1, 2)]
        for stream in streams:
            assert await tokens_of(stream) == [100, 101, 102, 103, 104]
    assert runner.steps[2:5] == [[1, 2], [1], [2]]


@pytest.mark.parametrize("num_tokens", [0, 2])
async def test_only_the_sequence_that_breaks_the_step_fails(
    runner: FakeRunner, num_tokens: int
) -> None:
    """num_tokens: sampled before the failure, in prefill (0) or in decode."""
    error = RuntimeError("out of memory")

    def step(
        chunks: list[ScheduledChunk], should_stop: Callable[[], bool] = lambda: False
    ) -> dict[Sequence, StepResult | Exception]:
        faulty = [c for c in chunks if c.sequence.prompt_ids[0] == 2]
        if faulty and len(faulty[0].sequence.completion_ids) == num_tokens:
            raise error
        return FakeRunner.step(runner, chunks)

    runner.step = step  # type: ignore[method-assign]
    async with running(runner, max_rows=4) as engine:
        streams = [engine.submit([i] * 9, SamplingParams(max_tokens=5)) for i in (1, 2, 3)]
        for healthy in (streams[0], streams[2]):
            assert await tokens_of(healthy) == [100, 101, 102, 103, 104]
        assert await events_of(engine, streams[1]) == [
            [*tokens(*range(100, 100 + num_tokens)), FailedEvent(error)]
        ]
    assert set(Counter(runner.released).values()) == {1}


async def test_a_failure_is_logged(runner: FakeRunner, caplog: pytest.LogCaptureFixture) -> None:
    runner.answers[1] = lambda sequence: ValueError("bad logits")
    async with running(runner) as engine:
        with pytest.raises(ValueError, match="bad logits"):
            await tokens_of(engine.submit([1], ENDLESS))
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert record.exc_info is not None and "bad logits" in str(record.exc_info[1])


# --- close ----------------------------------------------------------------------------


async def test_close_aborts_decoding_prefilling_and_waiting_sequences(runner: FakeRunner) -> None:
    async with running(runner, max_num_seqs=2, max_rows=2) as engine:
        decoding = engine.submit([1], ENDLESS)
        prefilling = engine.submit([2] * 10**6, ENDLESS)
        waiting = engine.submit([3], ENDLESS)
        await first_token(decoding)
        decoded, prefilled, waited = await events_of(engine, decoding, prefilling, waiting)
        assert decoded[-1] == AbortedEvent()
        assert all(isinstance(event, TokenEvent) for event in decoded[:-1])
        assert prefilled == waited == [AbortedEvent()]
        assert runner.ran <= set(runner.released)
        assert set(Counter(runner.released).values()) == {1}


async def test_closing_an_idle_engine_twice_is_harmless(runner: FakeRunner) -> None:
    engine = LocalEngine(runner, max_num_seqs=1, max_rows=2)
    assert engine.is_alive
    engine.close()
    assert not engine.is_alive
    engine.close()
    assert runner.steps == []


async def test_submit_and_score_after_close_raise_engine_closed_error(runner: FakeRunner) -> None:
    async with running(runner) as engine:
        await bounded(asyncio.to_thread(engine.close))
        with pytest.raises(EngineClosedError):
            engine.submit([1], ENDLESS)
        with pytest.raises(EngineClosedError):
            await bounded(engine.score([1], [[5]]))
        assert runner.steps == []


async def test_a_sequence_submitted_right_before_close_still_ends(runner: FakeRunner) -> None:
    async with running(runner) as engine:
        stream = engine.submit([1], ENDLESS)
        await bounded(asyncio.to_thread(engine.close))
        with pytest.raises(SequenceAbortedError):
            await tokens_of(stream)


# --- working together -----------------------------------------------------------------


async def test_two_streams_both_make_progress_in_every_step(runner: FakeRunner) -> None:
    runner.before_step = hold = Hold()
    async with running(runner) as engine:
        a = engine.submit([1], SamplingParams(max_tokens=6))
        b = engine.submit([2], SamplingParams(max_tokens=6))
        await hold.reached()
        hold.release()
        expected = [100, 101, 102, 103, 104, 105]
        assert list(await asyncio.gather(tokens_of(a), tokens_of(b))) == [expected] * 2
        # The second may have arrived after the first step began.
        assert runner.steps.count([1, 2]) >= 5


async def test_a_stream_goes_on_while_a_long_prompt_is_prefilled(runner: FakeRunner) -> None:
    runner.before_step = hold = Hold(number=2)
    async with running(runner, max_rows=2) as engine:
        stream = engine.submit([1], SamplingParams(max_tokens=10))
        await hold.reached()
        long = engine.submit([2] * 100, SamplingParams(max_tokens=1))
        hold.release()
        assert await tokens_of(stream) == list(range(100, 110))
        assert await tokens_of(long) == [100]
        # 8 tokens of the long prompt, each beside a token of the stream; then 2 in a step.
        assert runner.steps[2:10] == [[1, 2]] * 8
        assert runner.steps[10:] == [[2]] * 46


async def test_a_freed_slot_goes_to_the_next_waiting_sequence(runner: FakeRunner) -> None:
    async with running(runner, max_num_seqs=1) as engine:
        streams = [engine.submit([i], SamplingParams(max_tokens=2)) for i in range(1, 5)]
        for stream in streams:
            assert await tokens_of(stream) == [100, 101]
        assert runner.steps == [[1], [1], [2], [2], [3], [3], [4], [4]]


async def test_the_event_loop_is_free_while_a_step_runs(runner: FakeRunner) -> None:
    runner.before_step = hold = Hold()
    async with running(runner) as engine:
        stream = engine.submit([1], SamplingParams(max_tokens=1))
        await hold.reached()
        assert stream.events.empty()
        hold.release()
        assert await tokens_of(stream) == [100]


async def test_only_the_engine_thread_touches_the_runner(runner: FakeRunner) -> None:
    async with running(runner) as engine:
        aborted = engine.submit([1], ENDLESS)
        await first_token(aborted)
        aborted.abort()
        assert await tokens_of(engine.submit([2], SamplingParams(max_tokens=2)))
        assert await bounded(engine.score([3], [[5]]))
    assert len(runner.thread_ids) == 1
    assert threading.get_ident() not in runner.thread_ids


def test_a_reader_whose_event_loop_has_closed_does_not_stop_the_engine(runner: FakeRunner) -> None:
    runner.before_step = hold = Hold(number=2)
    engine = LocalEngine(runner, max_num_seqs=1, max_rows=8)

    async def leave_behind() -> None:
        engine.submit([1], SamplingParams(max_tokens=3))
        await hold.reached()

    async def come_after() -> list[int]:
        return await tokens_of(engine.submit([2], SamplingParams(max_tokens=2)))

    try:
        asyncio.run(leave_behind())
        hold.release()
        assert asyncio.run(come_after()) == [100, 101]
        assert engine.is_alive
    finally:
        hold.release()
        engine.close()


class Disturber:
    """Aborts streams at random and breaks six of the first steps. Use as `before_step`."""

    def __init__(self, rng: random.Random) -> None:
        self.streams: list[TokenStream] = []
        self._rng = rng
        # Two in a row: the second is the first sequence of the failed step, computed alone.
        self._failing_steps = {n + i for n in rng.sample(range(5, 60), 3) for i in (0, 1)}

    def __call__(self, number: int) -> None:
        for _ in range(self._rng.randrange(3)):
            if self.streams:
                self._rng.choice(self.streams).abort()
        if number in self._failing_steps:
            raise RuntimeError("the whole step")


def fail_at_third_token(sequence: Sequence) -> StepResult | Exception:
    if sequence.is_scored or len(sequence.completion_ids) == 2:
        return ValueError("this sequence")
    return [TokenEvent(5)]


@pytest.mark.parametrize("seed", range(8))
async def test_every_sequence_ends_exactly_once_under_any_mix(
    runner: FakeRunner, seed: int
) -> None:
    rng = random.Random(seed)
    runner.before_step = disturber = Disturber(random.Random(seed))
    runner.answers = dict.fromkeys(range(0, 60, 7), fail_at_third_token)
    scores: list[asyncio.Task[Scores]] = []
    async with running(runner, max_num_seqs=3, max_rows=4) as engine:
        for i in range(60):
            prompt_ids = [i] * rng.randint(1, 12)
            params = SamplingParams(
                max_tokens=rng.choice((1, 5, 10**9)),
                stop_token_ids=frozenset({rng.choice((100, 104, 7))}),
            )
            disturber.streams.append(engine.submit(prompt_ids, params))
            if i % 4 == 0:
                continuations, layers = rng.choice([([[5], [6]], ()), ([], (1, 3)), ([[5]], (2,))])
                score = engine.score(prompt_ids, continuations, layers=layers)
                scores.append(asyncio.create_task(score))
            if i % 20 == 4:
                # Returns only when the engine has computed most of the earlier sequences.
                await bounded(asyncio.wait([scores[-2]]))
                scores[-1].cancel()
        events = await events_of(engine, *disturber.streams)
        results = await bounded(asyncio.gather(*scores, return_exceptions=True))

    for seen in events:
        assert isinstance(seen[-1], Terminal), seen
        assert all(isinstance(event, TokenEvent) for event in seen[:-1]), seen
    kinds = {type(seen[-1]) for seen in events}
    assert {AbortedEvent, FinishedEvent, FailedEvent} <= kinds, "not every kind of end occurred"
    expected = (Scores, ValueError, RuntimeError, SequenceAbortedError, asyncio.CancelledError)
    assert all(isinstance(result, expected) for result in results)
    for result in results:
        assert not isinstance(result, Scores) or result.logprobs or result.hidden_states is not None
    releases = Counter(runner.released)
    assert runner.ran <= set(releases)
    assert set(releases.values()) == {1}


async def test_scored_and_sampled_sequences_share_steps(runner: FakeRunner) -> None:
    runner.before_step = hold = Hold(number=2)
    async with running(runner) as engine:
        stream = engine.submit([1], SamplingParams(max_tokens=5))
        await hold.reached()
        score = asyncio.create_task(engine.score([2, 2], [[5], [6]]))
        yielded = asyncio.Event()
        asyncio.get_running_loop().call_soon(yielded.set)
        await yielded.wait()
        hold.release()
        assert (await bounded(score)).logprobs == [0.0, -1.0]
        assert len(await tokens_of(stream)) == 5
        assert [1, 2] in runner.steps


def test_a_scored_event_is_terminal_and_a_token_event_is_not() -> None:
    assert isinstance(ScoredEvent([0.0]), Terminal)
    assert not isinstance(TokenEvent(1), Terminal)


async def test_an_abort_after_the_close_command_ends_no_sequence_twice(
    runner: FakeRunner,
) -> None:
    async def closes() -> None:
        while engine.is_alive:
            turn = asyncio.Event()
            asyncio.get_running_loop().call_soon(turn.set)
            await turn.wait()

    runner.before_step = hold = Hold()
    async with running(runner) as engine:
        stream = engine.submit([1], ENDLESS)
        await hold.reached()
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        await bounded(closes())
        with pytest.raises(EngineClosedError):
            engine.submit([2], ENDLESS)
        stream.abort()
        hold.release()
        await bounded(closing)
        (events,) = await events_of(engine, stream)
        assert events[-1] == AbortedEvent()
        assert events.count(AbortedEvent()) == 1
        assert len(runner.released) == 1


async def test_a_sequence_that_cannot_be_admitted_fails_alone(
    runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = MemoryError("no room")

    def admit(sequence: Sequence) -> int:
        if sequence.prompt_ids == [2]:
            raise error
        return 0

    monkeypatch.setattr(runner, "admit", admit)
    async with running(runner) as engine:
        streams = [engine.submit([i], SamplingParams(max_tokens=2)) for i in (1, 2, 3)]
        assert await tokens_of(streams[0]) == [100, 101]
        with pytest.raises(MemoryError):
            await tokens_of(streams[1])
        assert await tokens_of(streams[2]) == [100, 101]
        assert engine.is_alive


@pytest.mark.parametrize("broken", ["reserve", "suspend"])
async def test_a_sequence_whose_memory_call_raises_fails_alone(
    runner: FakeRunner, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    is_broken = False

    def reserve(sequence: Sequence) -> bool:
        nonlocal is_broken
        if sequence.prompt_ids == [2] and len(sequence.completion_ids) == 1 and not is_broken:
            is_broken = broken == "reserve"
            if is_broken:
                raise MemoryError("no room")
            return len(engine._scheduler.admission.running) == 2
        return True

    def suspend(sequence: Sequence) -> None:
        assert sequence.prompt_ids == [3]  # the newest
        raise MemoryError("no room")

    monkeypatch.setattr(runner, "reserve", reserve)
    monkeypatch.setattr(runner, "suspend", suspend)
    async with running(runner) as engine:
        streams = [engine.submit([i], SamplingParams(max_tokens=3)) for i in (1, 2, 3)]
        for i, stream in enumerate(streams, start=1):
            if i == (2 if broken == "reserve" else 3):
                with pytest.raises(MemoryError):
                    await tokens_of(stream)
            else:
                assert await tokens_of(stream) == [100, 101, 102]
        assert engine.is_alive


async def test_sequences_that_do_not_fit_wait_and_lose_nothing(runner: FakeRunner) -> None:
    room = 6
    held: dict[Sequence, int] = {}

    def reserve(sequence: Sequence) -> bool:
        needed = sequence.num_tokens
        if sum(held.values()) - held.get(sequence, 0) + needed > room:
            return False
        held[sequence] = needed
        return True

    def admit(sequence: Sequence) -> int | None:
        return 0 if reserve(sequence) else None

    def free(sequence: Sequence, is_sound: bool = True) -> None:
        held.pop(sequence, None)

    runner.admit, runner.reserve = admit, reserve  # type: ignore[method-assign]
    runner.suspend, runner.release = free, free  # type: ignore[method-assign]
    async with running(runner) as engine:
        streams = [engine.submit([i], SamplingParams(max_tokens=5)) for i in range(1, 5)]
        for stream in streams:
            assert await tokens_of(stream) == [100, 101, 102, 103, 104]
            assert stream.num_cached == 0
    assert not held


async def test_a_release_that_fails_still_ends_its_sequence(
    runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def release(sequence: Sequence, *, is_sound: bool) -> None:
        raise MemoryError("no room to remember it")

    monkeypatch.setattr(runner, "release", release)
    async with running(runner) as engine:
        for _ in range(2):
            stream = engine.submit([1], SamplingParams(max_tokens=1))
            assert await tokens_of(stream) == [100]


async def test_an_engine_that_breaks_down_ends_every_sequence_and_takes_no_more(
    runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(runner) as engine:
        monkeypatch.setattr(engine._scheduler, "schedule", lambda: 1 / 0)
        streams = [engine.submit([i], ENDLESS) for i in (1, 2)]
        for stream in streams:
            with pytest.raises((ZeroDivisionError, EngineClosedError)):
                await tokens_of(stream)
        engine._thread.join(BOUND_S)
        assert not engine.is_alive
        with pytest.raises(EngineClosedError):
            engine.submit([3], ENDLESS)


async def test_a_prompt_too_long_to_be_cached_is_not_prefilled(
    runner: FakeRunner,
) -> None:
    async with running(runner) as engine:
        assert await engine.prefill([1] * 1000) is None
        assert not runner.steps


async def test_an_idle_engine_rests_once_until_there_is_work_again(
    runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.core.engine.thread.REST_AFTER_S", 0.05)
    rests_by_step = []

    def before_step(_: int) -> None:
        time.sleep(0.1)  # longer than REST_AFTER_S
        rests_by_step.append(runner.num_rests)

    runner.before_step = before_step
    async with running(runner) as engine:
        for _ in range(2):
            runner.rested.clear()
            await tokens_of(engine.submit([1], SamplingParams(max_tokens=3)))
            assert await asyncio.to_thread(runner.rested.wait, BOUND_S)
            await asyncio.sleep(0.2)
    assert rests_by_step == [0, 0, 0, 1, 1, 1]
    assert runner.num_rests == 2
    assert len(runner.thread_ids) == 1


async def test_queue_s_is_how_long_the_first_sequence_of_a_request_waited(
    runner: FakeRunner,
) -> None:
    runner.before_step = hold = Hold()
    own, other = Work(), Work()
    async with running(runner, max_num_seqs=1) as engine:
        first = engine.submit([1], SamplingParams(max_tokens=1), work=own)
        await hold.reached()
        own_s = own.queue_s
        assert own_s is not None
        waiting = [engine.submit([i], SamplingParams(max_tokens=1), work=other) for i in (2, 3)]
        assert other.queue_s is None
        hold.release()
        await tokens_of(first)
        await tokens_of(waiting[0])
        other_s = other.queue_s
        assert other_s is not None
        await tokens_of(waiting[1])
        # Only the first sequence counts.
        assert (own.queue_s, other.queue_s) == (own_s, other_s)


# --- a long step and the next request -------------------------------------------------


class LongSteps(FakeRunner):
    """Long steps run until `should_stop` or until the test sets `is_over`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_interrupted = 0
        self.has_begun = threading.Event()
        self.is_over = threading.Event()

    def step(
        self, chunks: list[ScheduledChunk], should_stop: Callable[[], bool] = lambda: False
    ) -> dict[Sequence, StepResult | Exception]:
        if sum(chunk.num_rows for chunk in chunks) > 8:
            self.has_begun.set()
            while not self.is_over.wait(0.001):
                if should_stop():
                    self.num_interrupted += 1
                    raise StepInterruptedError
        return super().step(chunks, should_stop)


async def test_a_long_step_of_one_request_is_interrupted_when_another_arrives() -> None:
    runner = LongSteps()
    async with running(runner, max_rows=64) as engine:
        long = engine.submit([1] * 60, SamplingParams(max_tokens=1))
        assert await asyncio.to_thread(runner.has_begun.wait, BOUND_S)
        assert await tokens_of(engine.submit([2], SamplingParams(max_tokens=2))) == [100, 101]
        assert runner.num_interrupted == 1
        runner.is_over.set()
        assert await tokens_of(long) == [100]


async def test_an_interrupted_step_is_not_interrupted_again() -> None:
    runner = LongSteps()
    async with running(runner, max_rows=64) as engine:
        long = engine.submit([1] * 60, SamplingParams(max_tokens=1))
        for _ in range(3):
            assert await asyncio.to_thread(runner.has_begun.wait, BOUND_S)
            runner.has_begun.clear()
            other = engine.submit([2], SamplingParams(max_tokens=1))
            if runner.num_interrupted:
                break
            await tokens_of(other)
        await asyncio.sleep(0.05)
        assert runner.num_interrupted == 1
        runner.is_over.set()
        assert await tokens_of(long) == [100]
        assert await tokens_of(other) == [100]


async def test_a_sequence_of_the_same_request_interrupts_no_step() -> None:
    runner, work = LongSteps(), Work()
    async with running(runner, max_rows=64) as engine:
        long = engine.submit([1] * 60, SamplingParams(max_tokens=1), work=work)
        assert await asyncio.to_thread(runner.has_begun.wait, BOUND_S)
        more = engine.submit([2], SamplingParams(max_tokens=1), work=work)
        await asyncio.sleep(0.05)
        assert runner.num_interrupted == 0
        runner.is_over.set()
        assert await tokens_of(long) == await tokens_of(more) == [100]
