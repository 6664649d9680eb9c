"""More requests than there is room for: each gets an answer or a clear refusal, in time."""

import asyncio
import contextlib
import json
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import middleware
from server.config import Settings
from server.middleware import MAX_BODIES, BodyMiddleware
from tests.faults.conftest import (
    BOUND_S,
    endless,
    events_of,
    held,
    text_of,
    until_inside,
)
from tests.faults.test_hostile import connected
from tests.live.test_clients_at_once import is_idle, until
from tests.live.test_errors import assert_error
from tests.processes import Footprint, environment, started
from tests.servers import LiveServer

NUM_CLIENTS, MAX_QUEUE, MAX_NUM_SEQS = 200, 32, 16
NUM_CROWDS, MAX_GROWTH = 3, 1.05

Serve = Callable[[Settings], AbstractContextManager[LiveServer]]


@pytest.fixture(scope="module")
def crowded(tiny_checkpoint: Path, serve: Serve) -> Iterator[LiveServer]:
    settings = Settings(model=str(tiny_checkpoint), max_queue=MAX_QUEUE, max_num_seqs=MAX_NUM_SEQS)
    with serve(settings) as server:
        yield server


@pytest.fixture(scope="module")
def hasty(tiny_checkpoint: Path, serve: Serve) -> Iterator[LiveServer]:
    """One sequence at a time, and too little time to wait for a held engine."""
    settings = Settings(model=str(tiny_checkpoint), max_num_seqs=1, request_timeout=1.0)
    with serve(settings) as server:
        yield server


@pytest.fixture(scope="module")
def narrow(tiny_checkpoint: Path, serve: Serve) -> Iterator[LiveServer]:
    """One request at a time."""
    settings = Settings(model=str(tiny_checkpoint), max_num_seqs=1, max_queue=0)
    with serve(settings) as server:
        yield server


def url_of(server: LiveServer) -> str:
    return f"{server.base_url}/chat/completions"


def question(model: str, number: int) -> dict[str, Any]:
    """Every third is streamed. The reply to each is as good as unique."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": f"question {number}"}],
        "seed": number,
        "temperature": 1.5,
        "max_tokens": 8,
        "stream": number % 3 == 0,
    }


async def ask_alone(url: str, body: dict[str, Any]) -> httpx.Response:
    """Over a connection of its own. A client that has 200 looks through all at every step."""
    async with httpx.AsyncClient(timeout=60) as client:
        return await client.post(url, json=body)


def assert_refused(response: httpx.Response) -> None:
    assert_error(response, 429, "rate_limit_error", None, "queue_full")
    assert int(response.headers["retry-after"]) > 0


async def test_of_200_clients_at_once_each_gets_its_own_reply_or_a_429(
    client: httpx.AsyncClient, crowded: LiveServer
) -> None:
    statuses: Counter[int] = Counter()

    async def ask(number: int) -> httpx.Response:
        response = await ask_alone(url_of(crowded), question(crowded.model, number))
        statuses[response.status_code] += 1
        return response

    num_accepted = MAX_QUEUE + MAX_NUM_SEQS
    async with asyncio.timeout(BOUND_S):
        with held(crowded.services):
            asked = [asyncio.create_task(ask(number)) for number in range(NUM_CLIENTS)]
            await until(lambda: statuses[429] == NUM_CLIENTS - num_accepted)
            ready = await client.get(f"{crowded.url}/ready")
            assert ready.status_code == 503
            assert ready.json() == {"status": "busy", "requests": num_accepted}
            # Requests without work are admitted.
            models = await client.get(f"{crowded.base_url}/models")
            assert models.status_code == 200
        responses = await asyncio.gather(*asked)
    assert statuses == {200: num_accepted, 429: NUM_CLIENTS - num_accepted}
    together, alone = [], []
    for number, response in enumerate(responses):
        if response.status_code == 429:
            assert_refused(response)
        else:
            together.append(text_of(response))
            alone.append(text_of(await ask(number)))
    assert together == alone
    assert len(set(together)) > num_accepted * 0.9
    await until_inside(client, crowded, 0)
    await until(lambda: is_idle(crowded.engine))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
async def test_crowds_of_200_leave_no_memory_behind(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--model", str(tiny_checkpoint), "--max-queue", str(MAX_QUEUE))
    with started(environment(tmp_path), *options) as server:
        url = f"{server.url}/v1/chat/completions"

        async def crowds() -> Footprint:
            for _ in range(NUM_CROWDS):
                responses = await asyncio.gather(*(ask_alone(url, body) for body in questions))
                for response in responses:
                    if response.status_code == 429:
                        assert_refused(response)
                    else:
                        assert text_of(response) is not None
            return Footprint.of(server.process.pid)

        model = server.get("/v1/models").json()["data"][0]["id"]
        questions = [question(model, number) for number in range(NUM_CLIENTS)]
        before, after = await crowds(), await crowds()
    assert after.resident_kib < MAX_GROWTH * before.resident_kib
    assert after.num_threads <= before.num_threads


@pytest.mark.parametrize("kind", ["whole", "stream", "extract"])
async def test_a_client_that_hangs_up_makes_room_for_another(
    client: httpx.AsyncClient, narrow: LiveServer, kind: str
) -> None:
    body, url = endless(narrow, stream=kind == "stream"), url_of(narrow)
    if kind == "extract":
        body, url = {"input": ["one text", "another"]}, f"{narrow.base_url}/extract"
    with held(narrow.services):
        first = asyncio.create_task(client.post(url, json=body))
        await until_inside(client, narrow, 1)
        assert_refused(await client.post(url, json=body))
        first.cancel()
        await until_inside(client, narrow, 0)
        second = asyncio.create_task(client.post(url_of(narrow), json=question(narrow.model, 1)))
        await until_inside(client, narrow, 1)
    assert (await second).status_code == 200


def assert_out_of_time(response: httpx.Response) -> None:
    assert_error(response, 504, "server_error", None, "request_timeout")
    # The work would only be done twice.
    assert response.headers["x-should-retry"] == "false"


async def test_the_deadline_ends_what_runs_and_what_waits(
    client: httpx.AsyncClient, hasty: LiveServer
) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("chat/completions", endless(hasty)),
        ("chat/completions", endless(hasty)),
        # No response has begun as long as the mood is not known.
        ("chat/completions", question(hasty.model, 0)),
        ("completions", {"model": hasty.model, "prompt": "and then"}),
        ("responses", {"model": hasty.model, "input": "and then"}),
        ("classify", {"input": ["one text", "another"]}),
        ("extract", {"input": ["one text", "another"]}),
    ]
    async with asyncio.timeout(BOUND_S):
        with held(hasty.services):
            responses = await asyncio.gather(
                *(client.post(f"{hasty.base_url}/{path}", json=body) for path, body in bodies)
            )
            for response in responses:
                assert_out_of_time(response)
            await until_inside(client, hasty, 0)
    await until(lambda: is_idle(hasty.engine))


async def test_the_deadline_ends_a_stream_with_an_error_and_done(
    client: httpx.AsyncClient, hasty: LiveServer
) -> None:
    async with asyncio.timeout(BOUND_S):
        with held(hasty.services):
            # The first runs, the second waits.
            responses = await asyncio.gather(
                *(client.post(url_of(hasty), json=endless(hasty, stream=True)) for _ in range(2))
            )
            for response in responses:
                assert response.status_code == 200
                *_, error, end = events_of(response.text)
                assert json.loads(error)["error"]["code"] == "request_timeout"
                assert end == "[DONE]"
            await until_inside(client, hasty, 0)
    await until(lambda: is_idle(hasty.engine))


# --- bodies ---------------------------------------------------------------------------

MAX_BODY_BYTES = 100_000


@pytest.fixture
def held_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """What is held of all bodies. The page has a middleware of its own, which gets none."""
    readers: list[BodyMiddleware] = []
    init = BodyMiddleware.__init__

    def spy(self: BodyMiddleware, *args: Any, **options: Any) -> None:
        readers.append(self)
        init(self, *args, **options)

    monkeypatch.setattr(BodyMiddleware, "__init__", spy)
    return lambda: sum(reader._num_held_bytes for reader in readers)


@pytest.fixture
def small_bodied(
    held_bytes: Callable[[], int], tiny_checkpoint: Path, serve: Serve
) -> Iterator[LiveServer]:
    with serve(Settings(model=str(tiny_checkpoint), max_body_bytes=MAX_BODY_BYTES)) as server:
        yield server


def large(server: LiveServer, **changes: Any) -> bytes:
    """A chat whose body has nearly the largest size there may be."""
    body = json.dumps(endless(server, **changes))
    return body[:-1].encode() + b', "user": "%s"}' % (b"a" * (MAX_BODY_BYTES - 1000))


async def begun(server: LiveServer, body: bytes) -> socket.socket:
    """A connection over which all of the body but its end has come."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}"
    return await connected(server, head.encode() + b"\r\n\r\n" + body[:-1])


async def test_bodies_share_a_budget_before_they_are_let_in(
    client: httpx.AsyncClient, small_bodied: LiveServer, held_bytes: Callable[[], int]
) -> None:
    body = large(small_bodied, max_tokens=1)
    with contextlib.ExitStack() as stack:
        held_open = [
            stack.enter_context(await begun(small_bodied, body)) for _ in range(MAX_BODIES)
        ]
        await until(lambda: held_bytes() > MAX_BODIES * (len(body) - 10))
        # No request is admitted, and there is room for the start of one more body only.
        await until_inside(client, small_bodied, 0)
        with await begun(small_bodied, body) as refused:
            async with asyncio.timeout(BOUND_S):
                answer = await asyncio.get_running_loop().sock_recv(refused, 4096)
        assert answer.startswith(b"HTTP/1.1 429 ") and b"\r\nretry-after: " in answer
        # A client that sends the whole body gets the answer, too.
        response = await client.post(url_of(small_bodied), content=body)
        message = assert_error(response, 429, "rate_limit_error", None, "queue_full")
        assert "bodies" in message
        # A short request is read although the memory for bodies is full.
        short = endless(small_bodied, max_tokens=1)
        assert (await client.post(url_of(small_bodied), json=short)).status_code == 200
        # A client that completes its body is answered, and makes room.
        held_open[0].send(body[-1:])
        async with asyncio.timeout(BOUND_S):
            assert (await asyncio.get_running_loop().sock_recv(held_open[0], 20))[9:12] == b"200"
        await until(lambda: held_bytes() < MAX_BODIES * (len(body) - 10))
        assert (await client.post(url_of(small_bodied), content=body)).status_code == 200
    # A client that hangs up makes room as well.
    await until(lambda: held_bytes() == 0)


async def test_a_body_counts_until_it_is_answered(
    client: httpx.AsyncClient, small_bodied: LiveServer, held_bytes: Callable[[], int]
) -> None:
    body = large(small_bodied, max_tokens=1)
    with held(small_bodied.services):
        running = [
            asyncio.create_task(client.post(url_of(small_bodied), content=body))
            for _ in range(MAX_BODIES)
        ]
        await until_inside(client, small_bodied, MAX_BODIES)
        response = await client.post(url_of(small_bodied), content=body)
        assert_error(response, 429, "rate_limit_error", None, "queue_full")
    assert [response.status_code for response in await asyncio.gather(*running)] == [200] * 16
    assert (await client.post(url_of(small_bodied), content=body)).status_code == 200
    await until(lambda: held_bytes() == 0)


@pytest.mark.parametrize("rest", ["too long", "late", "left"])
async def test_a_body_that_fails_does_not_count(
    small_bodied: LiveServer, held_bytes: Callable[[], int], monkeypatch: pytest.MonkeyPatch,
    rest: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", 0.2 if rest == "late" else 60)
    head = b"POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    size = MAX_BODY_BYTES + 1 if rest == "too long" else MAX_BODY_BYTES // 2
    with await connected(small_bodied, head + b"%x\r\n%s" % (size, b"a" * size)) as connection:
        if rest == "left":
            await until(lambda: held_bytes() == size)
        else:
            async with asyncio.timeout(BOUND_S):
                answer = await asyncio.get_running_loop().sock_recv(connection, 20)
            assert answer[9:12] == (b"413" if rest == "too long" else b"408")
    await until(lambda: held_bytes() == 0)
