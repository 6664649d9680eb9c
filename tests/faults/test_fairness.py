"""One heavy request beside others: they are served in turns, and the event loop stays free.

What others wait for is counted in rows of the engine's steps, which is what costs time. How many
seconds that are on a real model, `python -m benchmarks.fairness` measures.
"""

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.heavy import Request, Writer
from server.app import create_app
from server.config import Settings
from server.loading import load_services
from server.services import Services
from tests.faults.conftest import BOUND_S, contents_of, never_ending, until_inside
from tests.live.test_clients_at_once import is_idle, until
from tests.servers import LiveServer, local_engine, run_app

MAX_ROWS = 256  # of a step, by default
# What is computed meanwhile, at most, for each heavy request beside: some four times what is usual.
MAX_ROWS_TO_FIRST_TOKEN = 1024
MAX_ROWS_TO_NEXT_TOKEN = 128
NUM_NEXT_TOKENS = 30
MAX_TURN_S = 0.25
NUM_TRIES = 3
# What the chat and the stream of these tests are known by among the engine's sequences.
SEED = 150_015

Loads = dict[str, Callable[[Writer], Request]]

# None is over before the measurement is.
LOADS: Loads = {
    "256 texts": Writer.classify,
    "50 own labels": lambda writer: writer.own_labels(16),
    "16 choices": Writer.choices,
    "a long prompt": lambda writer: writer.long_prompt(70),
    "400 questions": Writer.decisions,
}
# Each is answered.
WHOLE: Loads = {
    **LOADS,
    "16 choices": lambda writer: writer.choices(max_tokens=50),
    "a long prompt": lambda writer: writer.long_prompt(18),
    "a megabyte, too long": lambda writer: writer.long_prompt(12_000),
}
ALL = "all at once"


def requests_of(load: str, loads: Loads, writer: Writer) -> list[Request]:
    return [loads[name](writer) for name in (loads if load == ALL else [load])]


class Step(NamedTuple):
    """How many rows a step computed, and whether some were of the sequence with SEED."""

    num_rows: int
    is_own: bool


class Steps:
    """Notes the steps of an engine, and holds each until it is let through."""

    def __init__(self, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
        runner: Any = local_engine(services)._runner
        self.done: list[Step] = []
        self._step, self._passes, self._is_open = runner.step, threading.Semaphore(0), False
        monkeypatch.setattr(runner, "step", self._wait_then_step)

    @property
    def num_own(self) -> int:
        return sum(step.is_own for step in self.done)

    def let_through(self, number: int) -> None:
        self._passes.release(number)

    def open(self) -> None:
        """For all steps from now on."""
        self._is_open = True
        self._passes.release()

    def _wait_then_step(self, chunks: Any, *args: Any) -> Any:
        if not self._is_open:
            assert self._passes.acquire(timeout=BOUND_S), "the test never let the step through"
        try:
            results = self._step(chunks, *args)
        except Exception:
            self._passes.release()  # an interrupted step has computed nothing
            raise
        params = [chunk.sequence.params for chunk in chunks]
        is_own = any(each is not None and each.seed == SEED for each in params)
        self.done.append(Step(sum(chunk.num_rows for chunk in chunks), is_own))
        return results


@pytest.fixture
async def steps(mini: LiveServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Steps]:
    steps = Steps(mini.services, monkeypatch)
    try:
        yield steps
    finally:
        steps.open()
        await until(lambda: is_idle(mini.engine))


@pytest.fixture
def writer(mini: LiveServer) -> Writer:
    return Writer(mini.model, never_ending(mini.services))


@asynccontextmanager
async def sent(
    client: httpx.AsyncClient, server: LiveServer, requests: Sequence[Request]
) -> AsyncIterator[None]:
    """Sends all; those without an answer at the end of the block hang up."""
    posts = (client.post(f"{server.base_url}/{path}", json=body) for path, body in requests)
    tasks = [asyncio.create_task(post) for post in posts]
    try:
        yield
        for task in filter(asyncio.Task.done, tasks):
            assert task.result().status_code == 200, task.result().text
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("load", [*LOADS, ALL])
async def test_the_first_token_of_a_short_chat_waits_for_few_rows_of_others(
    client: httpx.AsyncClient, mini: LiveServer, steps: Steps, writer: Writer, load: str
) -> None:
    requests = requests_of(load, LOADS, writer)
    path, chat = writer.chat(writer.sentence(), seed=SEED, max_tokens=1)
    async with sent(client, mini, requests):
        await until_inside(client, mini, len(requests))
        steps.let_through(2)
        await until(lambda: len(steps.done) == 2)
        # The load is being computed, and waits in the middle of it until the chat is there, too.
        answer = asyncio.create_task(client.post(f"{mini.base_url}/{path}", json=chat))
        await until_inside(client, mini, len(requests) + 1)
        steps.open()
        assert contents_of(await asyncio.wait_for(answer, BOUND_S))
    own = [i for i, step in enumerate(steps.done) if step.is_own]
    waited = steps.done[2 : own[-1] + 1]
    assert sum(step.num_rows for step in waited) <= MAX_ROWS_TO_FIRST_TOKEN * len(requests)
    assert max(step.num_rows for step in steps.done) <= MAX_ROWS


@pytest.mark.parametrize("load", [*LOADS, ALL])
async def test_between_two_tokens_of_a_stream_lie_few_rows_of_others(
    client: httpx.AsyncClient, mini: LiveServer, steps: Steps, writer: Writer, load: str
) -> None:
    requests = requests_of(load, LOADS, writer)
    steps.open()
    async with sent(client, mini, [writer.endless("go on", seed=SEED)]):
        await until(lambda: steps.num_own > 3)
        async with sent(client, mini, requests):
            await until_inside(client, mini, 1 + len(requests))
            begin, num_own = len(steps.done), steps.num_own
            await until(lambda: steps.num_own > num_own + NUM_NEXT_TOKENS)
            beside = steps.done[begin:]
    own = [i for i, step in enumerate(beside) if step.is_own]
    rows = [
        sum(step.num_rows for step in beside[a + 1 : b + 1]) for a, b in itertools.pairwise(own)
    ]
    assert max(rows) <= MAX_ROWS_TO_NEXT_TOKEN
    assert max(step.num_rows for step in beside) <= MAX_ROWS


# --- the event loop -------------------------------------------------------------------


class Watched:
    """An application on whose event loop a task notes what the loop computed between two turns.

    In CPU time of the loop's thread, for on a busy machine any thread is late.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.turns_s: list[float] = []
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        watching = asyncio.create_task(self._watch())
        try:
            await self._app(scope, receive, send)
        finally:
            watching.cancel()

    async def _watch(self) -> None:
        while True:
            begin = time.thread_time()
            await asyncio.sleep(0.005)
            self.turns_s.append(time.thread_time() - begin)


@pytest.fixture(scope="module")
def watched(tiny_checkpoint: Path) -> Iterator[tuple[LiveServer, Watched]]:
    """The random model, whose steps are so short that the loop has most to do."""
    settings = Settings(model=str(tiny_checkpoint), ui=False)
    services = load_services(settings)
    app = Watched(create_app(settings, services))
    try:
        with run_app(app) as url:
            yield LiveServer(url, services), app
    finally:
        services.engine.close()


@pytest.mark.parametrize("load", [*WHOLE, ALL])
async def test_no_heavy_request_holds_the_event_loop(
    client: httpx.AsyncClient, watched: tuple[LiveServer, Watched], load: str
) -> None:
    server, app = watched
    writer = Writer(server.model, never_ending(server.services))
    worst_s = []
    # A collection of garbage may come between; a loop that is held is held every time.
    for _ in range(NUM_TRIES):
        requests = requests_of(load, WHOLE, writer)
        app.turns_s.clear()
        posts = (client.post(f"{server.base_url}/{path}", json=body) for path, body in requests)
        for response in await asyncio.gather(*posts):
            assert response.status_code in (200, 400), response.text
        worst_s.append(max(app.turns_s))
        if worst_s[-1] < MAX_TURN_S:
            return
    pytest.fail(f"the event loop was held for {worst_s} s")
