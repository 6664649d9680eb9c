"""The response of an ASGI application as an iterator."""

import asyncio
from contextlib import aclosing

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from server.cluster.exchange import exchange

SCOPE = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}


async def test_the_application_gets_the_body_and_its_messages_are_returned() -> None:
    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        await PlainTextResponse(body + b"!")(scope, receive, send)

    start, body = [message async for message in exchange(echo, SCOPE, b"text")]
    assert start["status"] == 200 and body["body"] == b"text!"


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_the_application_gets_a_disconnect_when_the_iterator_ends(is_cancelled: bool) -> None:
    ended = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert await receive() == {"type": "http.disconnect"}
        ended.set()

    begun = asyncio.Event()

    async def read() -> None:
        async with aclosing(exchange(endless, SCOPE, b"")) as messages:
            async for _ in messages:
                begun.set()
                if not is_cancelled:
                    return

    reading = asyncio.create_task(read())
    await begun.wait()
    if is_cancelled:
        reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert ended.is_set()


async def test_an_error_of_the_application_is_raised() -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        raise ClientDisconnect

    with pytest.raises(ClientDisconnect):
        [message async for message in exchange(failing, SCOPE, b"")]
