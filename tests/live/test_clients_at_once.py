"""Several clients at the same time, and clients that go away."""

import asyncio
import dataclasses
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from server.core.engine.local import LocalEngine
from server.core.engine.sequence import SamplingParams, Sequence
from server.core.text.tokenizer import ChatTokenizer
from server.routes import replying
from server.routes.sampling import sampling_params
from tests.servers import LiveServer

BOUND_S = 30


def request(live: LiveServer, text: str, **changes: object) -> dict[str, object]:
    return {"model": live.model, "messages": [{"role": "user", "content": text}], **changes}


async def until(is_so: Callable[[], bool]) -> None:
    """Waits for a state of the engine's thread, which has no event to wait on."""
    async with asyncio.timeout(BOUND_S):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def is_idle(engine: LocalEngine) -> bool:
    return engine._scheduler.admission.is_idle and not engine._runner._states  # type: ignore[attr-defined]


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=60) as client:
        yield client


@pytest.fixture
def endless(tiny: LiveServer, monkeypatch: pytest.MonkeyPatch) -> LiveServer:
    """The random model, never ending by itself and slow enough to be left in the middle."""
    step = tiny.engine._runner.step

    def slow_step(*args: Any) -> object:
        time.sleep(0.002)
        return step(*args)

    monkeypatch.setattr(tiny.engine._runner, "step", slow_step)
    # Read at every request; the services themselves are frozen.
    monkeypatch.setattr(replying, "sampling_params", _never_ending(sampling_params))
    return tiny


def _never_ending(sampling_params: Callable[..., SamplingParams]) -> Callable[..., SamplingParams]:
    return lambda *args, **options: dataclasses.replace(
        sampling_params(*args, **options), stop_token_ids=frozenset()
    )


async def test_two_streams_both_make_progress(
    client: httpx.AsyncClient, endless: LiveServer
) -> None:
    arrivals: list[str] = []

    async def read(name: str) -> None:
        body = request(endless, name, stream=True, max_tokens=150)
        url = f"{endless.base_url}/chat/completions"
        async with client.stream("POST", url, json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    arrivals.append(name)

    await asyncio.gather(read("first"), read("second"))
    first_end = len(arrivals) - 1 - arrivals[::-1].index("first")
    second_end = len(arrivals) - 1 - arrivals[::-1].index("second")
    # Each has chunks before the other's last one: neither waited for the other to end.
    assert arrivals.index("second") < first_end
    assert arrivals.index("first") < second_end


async def test_each_of_many_clients_gets_its_own_reply(
    client: httpx.AsyncClient, tiny: LiveServer
) -> None:
    url = f"{tiny.base_url}/chat/completions"

    async def ask(i: int) -> str:
        body = request(tiny, f"question {i}", seed=i, max_tokens=12, temperature=1.5)
        response = await client.post(url, json=body)
        assert response.status_code == 200, response.text
        content: str = response.json()["choices"][0]["message"]["content"]
        return content

    together = await asyncio.gather(*(ask(i) for i in range(24)))
    alone = [await ask(i) for i in range(24)]
    assert together == alone


async def test_equal_texts_at_once_are_judged_once(
    client: httpx.AsyncClient, tiny: LiveServer
) -> None:
    classifier = tiny.services.classifier
    before = classifier.num_misses
    body = {"input": ["the very same words"] * 8}
    responses = await asyncio.gather(
        *(client.post(f"{tiny.base_url}/classify", json=body) for _ in range(4))
    )
    assert {r.status_code for r in responses} == {200}
    assert len({json.dumps(r.json()["data"][0]["probabilities"]) for r in responses}) == 1
    assert classifier.num_misses == before + 1


async def test_hanging_up_during_a_stream_frees_its_slot(endless: LiveServer) -> None:
    body = request(endless, "stream", stream=True)
    async with httpx.AsyncClient(timeout=60) as client:
        url = f"{endless.base_url}/chat/completions"
        async with client.stream("POST", url, json=body) as response:
            lines = response.aiter_lines()
            for _ in range(6):
                await anext(lines)
            assert not is_idle(endless.engine)
    await until(lambda: is_idle(endless.engine))


async def leave_once(
    live: LiveServer, path: str, body: dict[str, object], is_so: Callable[[], bool]
) -> None:
    """Sends a request and hangs up as soon as the engine is where it should be."""
    content = json.dumps(body).encode()
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/{path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + content)
        await until(is_so)


async def test_hanging_up_before_a_whole_reply_ends_it(endless: LiveServer) -> None:
    engine = endless.engine
    answering: list[Sequence] = []

    def is_answering() -> bool:
        answering[:] = [s for s in engine._scheduler.admission.running if s.completion_ids]
        return bool(answering)

    body = request(endless, "whole", max_tokens=400)
    await leave_once(endless, "chat/completions", body, is_answering)
    await until(lambda: is_idle(engine))
    # It was ended, not merely waited for.
    [sequence] = answering
    assert 0 < len(sequence.completion_ids) < 400


async def test_hanging_up_before_all_labels_are_there_ends_their_passes(
    endless: LiveServer,
) -> None:
    engine, classifier = endless.engine, endless.services.classifier
    texts = [f"label {i} " * 30 for i in range(100)]
    await leave_once(endless, "classify", {"input": texts}, lambda: not is_idle(engine))
    await until(lambda: is_idle(engine))
    assert not classifier._results._flights
    # They were ended, not merely waited for.
    task = endless.services.tasks["sentiment"]
    assert classifier.prepare(task, texts).prompt_ids, "all labels are known"


async def test_a_client_that_leaves_with_half_a_body_does_no_harm(
    client: httpx.AsyncClient, tiny: LiveServer
) -> None:
    host, port = tiny.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b'POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{"input":'
        )
    response = await client.post(f"{tiny.base_url}/classify", json={"input": "still here"})
    assert response.status_code == 200


async def test_a_long_prompt_does_not_hold_up_a_running_stream(
    client: httpx.AsyncClient, endless: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = endless.engine._scheduler
    monkeypatch.setattr(scheduler, "_max_rows", 16)
    longest = 0
    schedule = scheduler.schedule

    def spy() -> object:
        nonlocal longest
        chunks = schedule()
        longest = max(longest, sum(c.num_tokens for c in chunks if c.num_tokens > 1))
        return chunks

    monkeypatch.setattr(scheduler, "schedule", spy)
    short = client.post(
        f"{endless.base_url}/chat/completions", json=request(endless, "short", max_tokens=60)
    )
    long = client.post(
        f"{endless.base_url}/chat/completions",
        json=request(endless, "long words " * 100, max_tokens=2),
    )
    for response in await asyncio.gather(short, long):
        assert response.status_code == 200, response.text
    assert longest == 16


LONG = "word " * 4000
SAID = [{"role": "user", "content": LONG}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": SAID}),
        ("/v1/responses", {"input": LONG}),
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/classify", {"input": LONG}),
        (
            "/v1/decisions",
            {"input": LONG, "questions": [{"type": "predicate", "instructions": "?"}]},
        ),
        ("/tokenize", {"prompt": LONG}),
        ("/tokenize", {"messages": SAID}),
    ],
)
async def test_encoding_a_long_text_blocks_no_other_request(
    client: httpx.AsyncClient,
    tiny: LiveServer,
    path: str,
    body: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, encode = set(), ChatTokenizer.encode_text

    def note_thread(self: ChatTokenizer, text: str) -> list[int]:
        if LONG.strip() in text:
            threads.add(threading.current_thread().name)
        return encode(self, text)

    monkeypatch.setattr(ChatTokenizer, "encode_text", note_thread)
    response = await client.post(tiny.url + path, json={"model": tiny.model, **body})
    assert response.status_code == (200 if path == "/tokenize" else 400), response.text
    assert threads and all(name.startswith("asyncio_") for name in threads)
