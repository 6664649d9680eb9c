"""Server-sent events: whatever the client does, the computation of a stream ends."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message

from server.routes.streaming import stream

BOUND_S = 20


@pytest.mark.parametrize("blocked", ["http.response.start", "http.response.body"])
async def test_a_client_that_disconnects_without_reading_aborts_the_work(blocked: str) -> None:
    is_blocked, aborts = asyncio.Event(), []

    async def contents() -> AsyncIterator[dict[str, Any]]:
        yield {"text": "never read"}

    async def receive() -> Message:
        await is_blocked.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == blocked:
            is_blocked.set()
            await asyncio.Event().wait()  # the client's buffers are full

    deadline = asyncio.get_running_loop().time() + BOUND_S
    scope = {"type": "http", "method": "POST", "deadline": deadline}
    response = stream(Request(scope), contents(), lambda: aborts.append(1), headers={})
    async with asyncio.timeout(BOUND_S):
        await response(scope, receive, send)
    assert aborts
