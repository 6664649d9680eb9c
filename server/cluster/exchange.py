"""One request of an ASGI application, as an iterator of the messages it answers with."""

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import ASGIApp, Message, Scope


async def exchange(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
    """The messages of the response, as they come.

    The application sees a client that hangs up when the iterator is closed or cancelled.
    """
    messages = asyncio.Queue[Message | None]()
    has_left = asyncio.Event()
    requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await has_left.wait()
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
        has_left.set()
        await asyncio.wait([serving])
