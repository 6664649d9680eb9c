"""What the tests of faults share: requests that last, and an engine that is held."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from server.services import Services
from tests.servers import LiveServer, local_engine

BOUND_S = 30


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """As many connections as are asked for, and no retries."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        yield client


def endless(server: LiveServer, **changes: Any) -> dict[str, Any]:
    """A chat that goes on until its context is full."""
    return {
        "model": server.model,
        "messages": [{"role": "user", "content": "never stop"}],
        "sentiment": False,
        "logit_bias": never_ending(server.services),
        **changes,
    }


def never_ending(services: Services) -> dict[str, float]:
    """The bias under which no reply ends by itself."""
    return {str(token_id): -100.0 for token_id in services.defaults.eos_token_ids}


@contextmanager
def held(services: Services, *, answers_only: bool = False) -> Iterator[None]:
    """Keeps the engine from computing anything, or any answer, until the block ends."""
    free = threading.Event()
    runner: Any = local_engine(services)._runner
    step = runner.step

    def wait_then_step(chunks: Any, *args: Any) -> Any:
        if not answers_only or any(chunk.sequence.params is not None for chunk in chunks):
            assert free.wait(BOUND_S), "the test never let the engine go"
        return step(chunks, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "step", wait_then_step)
        try:
            yield
        finally:
            free.set()


async def num_inside(client: httpx.AsyncClient, server: LiveServer) -> int:
    """Requests that are behind the gate."""
    inside: int = (await client.get(f"{server.url}/ready")).json()["requests"]
    return inside


async def until_inside(client: httpx.AsyncClient, server: LiveServer, number: int) -> None:
    """Waits until so many requests are behind the gate."""
    async with asyncio.timeout(BOUND_S):
        while await num_inside(client, server) != number:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def events_of(text: str) -> list[str]:
    """The data of a stream's events, without the comments that keep it alive."""
    blocks = text.strip().split("\n\n")
    return [block.split("data: ", 1)[1] for block in blocks if not block.startswith(":")]


def contents_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The one object of a whole reply, or all of a stream's."""
    assert response.status_code == 200, response.text
    if not response.headers["content-type"].startswith("text/event-stream"):
        return [response.json()]
    *chunks, end = events_of(response.text)
    assert end == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def text_of(response: httpx.Response) -> str:
    """What a chat was answered, whole or streamed."""
    choices = [content["choices"][0] for content in contents_of(response)]
    said = [choice.get("message") or choice["delta"] for choice in choices]
    return "".join(message.get("content", "") for message in said)
