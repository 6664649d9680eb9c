"""Calls an ASGI application and iterates over the messages of its response."""

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import ASGIApp, Message, Scope


async def exchange(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
    """Yields the messages of the response as the application sends them.

    If the iterator is closed or cancelled, the application receives a disconnect.
    """
    messages = asyncio.Queue[Message | None]()
    is_disconnected = asyncio.Event()
    requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await is_disconnected.wait()
        return {"type": "http.disconnect"}

    async def serve() -> None:
        try:
            await app(scope, receive, messages.put)
        finally:
            messages.put_nowait(None)

    serving = asyncio.create_task(serve())
    try:
        while (message := await messages.get()) is not None:
            yield message
        await serving  # raises what the application raised
    finally:
        is_disconnected.set()
        await asyncio.wait([serving])
