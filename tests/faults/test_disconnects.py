"""Clients that hang up, wherever their request is: its slot is free within one step."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.config import Settings
from server.core.engine.local import LocalEngine
from server.core.engine.sequence import Sequence
from tests.faults.conftest import BOUND_S, contents_of, endless, until_inside
from tests.live.test_clients_at_once import is_idle, until
from tests.servers import LiveServer

MAX_PREFILL_TOKENS = 16


class Turnstile:
    """Lets the steps of an engine through one by one."""

    def __init__(self, engine: LocalEngine) -> None:
        runner: Any = engine._runner
        self._engine, self._step, self._passes = engine, runner.step, threading.Semaphore(0)
        self._is_open = False
        self.num_begun, self.num_done = 0, 0
        runner.step = self._wait_then_step

    def open(self) -> None:
        """For all steps from now on."""
        self._is_open = True
        self._passes.release()

    def let_one_through(self) -> None:
        self._passes.release()

    @property
    def is_holding(self) -> bool:
        """Whether a step has begun and waits; the scheduler stands still then."""
        return self.num_begun > self.num_done

    async def step_until(self, is_so: Callable[[], bool]) -> None:
        """Goes on step by step; the one that begins when it is so is held."""
        async with asyncio.timeout(BOUND_S):
            while True:
                await until(lambda: self.is_holding)
                if is_so():
                    return
                number = self.num_begun
                self.let_one_through()
                await until(lambda number=number: self.num_done == number)  # type: ignore[misc]

    async def end_of_step(self) -> None:
        """Lets the held step through, up to the next one or to the end of all work."""
        number = self.num_begun
        self.let_one_through()
        await until(lambda: self.num_begun > number or is_idle(self._engine))

    def _wait_then_step(self, *args: Any) -> Any:
        self.num_begun += 1
        if not self._is_open:
            assert self._passes.acquire(timeout=BOUND_S), "the test never let the step through"
        try:
            return self._step(*args)
        finally:
            self.num_done += 1


@pytest.fixture(scope="module")
def pair(
    tiny_checkpoint: Path, serve: Callable[[Settings], AbstractContextManager[LiveServer]]
) -> Iterator[LiveServer]:
    """Two sequences at a time: a sentiment pass and the conversation beside it."""
    settings = Settings(
        model=str(tiny_checkpoint), max_num_seqs=2, max_num_batched_tokens=MAX_PREFILL_TOKENS
    )
    with serve(settings) as server:
        yield server


@pytest.fixture
def turnstile(pair: LiveServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Turnstile]:
    runner: Any = pair.engine._runner
    # Put back in the end.
    monkeypatch.setattr(runner, "step", runner.step)
    turnstile = Turnstile(pair.engine)
    try:
        yield turnstile
    finally:
        turnstile.open()


def sequences(engine: LocalEngine) -> list[Sequence]:
    return [*engine._scheduler.admission.running, *engine._scheduler.admission.waiting]


def is_waiting(engine: LocalEngine) -> bool:
    return engine.num_waiting > 0


def is_in_prefill(engine: LocalEngine) -> bool:
    return any(
        0 < sequence.num_computed < len(sequence.prompt_ids) - 1
        for sequence in engine._scheduler.admission.running
        if sequence.params is not None
    )


def is_in_decode(engine: LocalEngine) -> bool:
    return any(len(sequence.completion_ids) > 1 for sequence in engine._scheduler.admission.running)


def is_being_judged(engine: LocalEngine) -> bool:
    return any(sequence.is_scored for sequence in engine._scheduler.admission.running)


PHASES = {
    "queueing": is_waiting,
    "prefill": is_in_prefill,
    "decode": is_in_decode,
    "sentiment": is_being_judged,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", PHASES)
async def test_hanging_up_frees_the_slot_within_one_step(
    client: httpx.AsyncClient, pair: LiveServer, turnstile: Turnstile, phase: str, stream: bool
) -> None:
    engine, url = pair.engine, f"{pair.base_url}/chat/completions"
    others = []
    if phase == "queueing":
        others = [asyncio.create_task(client.post(url, json=endless(pair))) for _ in range(2)]
        await turnstile.step_until(lambda: engine.num_running == 2)
    staying = sequences(engine)
    body = endless(
        pair,
        messages=[{"role": "user", "content": f"{phase}, {stream}: " + "many words " * 20}],
        sentiment=phase == "sentiment",
        stream=stream,
    )
    leaving = asyncio.create_task(client.post(url, json=body))
    await turnstile.step_until(lambda: PHASES[phase](engine))
    leaving.cancel()
    # The server has seen it, in the middle of a step.
    await until_inside(client, pair, len(others))
    assert len(sequences(engine)) > len(staying)
    await turnstile.end_of_step()
    assert sequences(engine) == staying
    assert set(engine._runner._states) == set(staying)  # type: ignore[attr-defined]
    for other in others:
        other.cancel()
    turnstile.open()
    await until(lambda: is_idle(engine))


async def test_hanging_up_on_an_extraction_frees_its_slots_within_one_step(
    client: httpx.AsyncClient, pair: LiveServer, turnstile: Turnstile
) -> None:
    engine, extractor = pair.engine, pair.services.extractor
    body = {"input": [f"The {word} of many words was late." for word in ("first", "second")]}
    leaving = asyncio.create_task(client.post(f"{pair.base_url}/extract", json=body))
    await turnstile.step_until(lambda: is_in_decode(engine))
    assert len(sequences(engine)) == 2
    leaving.cancel()
    # The server has seen it, in the middle of a step.
    await until_inside(client, pair, 0)
    await turnstile.end_of_step()
    assert not sequences(engine) and not engine._runner._states  # type: ignore[attr-defined]
    turnstile.open()
    await until(lambda: is_idle(engine))
    # An unfinished result is not cached.
    again = (await client.post(f"{pair.base_url}/extract", json=body)).json()["data"]
    assert all(item["items"] and not item["cached"] for item in again)
    assert not extractor._results._flights


@pytest.mark.parametrize("stream", [False, True])
async def test_a_shared_sentiment_pass_outlives_one_who_hangs_up(
    client: httpx.AsyncClient, pair: LiveServer, turnstile: Turnstile, stream: bool
) -> None:
    engine, classifier = pair.engine, pair.services.classifier
    num_misses, url = classifier.num_misses, f"{pair.base_url}/chat/completions"
    body = {
        "model": pair.model,
        "messages": [{"role": "user", "content": f"both say it, stream {stream}"}],
        "max_tokens": 2,
        "stream": stream,
    }
    # The client that hangs up is the one that started the pass.
    leaving = asyncio.create_task(client.post(url, json=body))
    await turnstile.step_until(lambda: is_being_judged(engine))
    staying = asyncio.create_task(client.post(url, json=body))
    await until(lambda: [p.num_waiters for p in classifier._results._flights.values()] == [2])
    leaving.cancel()
    await until_inside(client, pair, 1)
    turnstile.open()
    sentiment = contents_of(await staying)[0]["sentiment"]
    assert sentiment["label"] and sentiment["cached"]
    assert classifier.num_misses == num_misses + 1
    await until(lambda: is_idle(engine))
