"""Streams of server-sent events: their beginning, errors and end."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.types import Message as ASGIMessage

from server.errors import APIError, InternalError, RequestTimeoutError
from server.routes.common import work_of

logger = logging.getLogger(__name__)

PING_INTERVAL_S = 15
# After so long without reading, a client is disconnected. Until then, unread data is kept.
SEND_TIMEOUT_S = 60


def stream(
    request: Request,
    contents: AsyncIterator[Mapping[str, Any]],
    abort: Callable[[], None],
    headers: Mapping[str, str],
    *,
    end: str | None = "[DONE]",
) -> EventSourceResponse:
    """Sends an event for each of the contents, named by the content's `type`, if any.

    When the request's deadline passes, ends with an error.
    abort: ends the computation of the contents; called however the stream ends.
    end: the data of the last event, even after an error.
    """

    async def on_close(_: ASGIMessage) -> None:
        # A generator suspended at `yield` may never run its `finally`.
        abort()

    return EventSourceResponse(
        _events(request, contents, abort, end),
        headers=headers,
        sep="\n",
        ping=PING_INTERVAL_S,
        send_timeout=SEND_TIMEOUT_S,
        client_close_handler_callable=on_close,
    )


async def _events(
    request: Request,
    contents: AsyncIterator[Mapping[str, Any]],
    abort: Callable[[], None],
    end: str | None,
) -> AsyncIterator[dict[str, str]]:
    # Dicts, for a ServerSentEvent has its own line separator, CRLF.
    try:
        while (content := await _next(request, contents)) is not None:
            yield _event(content)
    except APIError as error:
        yield _event(error.body())
    except Exception:
        logger.exception("a stream failed")
        yield _event(InternalError().body())
    finally:
        abort()
    if end is not None:
        yield {"data": end}


async def _next(
    request: Request, contents: AsyncIterator[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """The next content; None after the last.

    Raises:
        RequestTimeoutError: the deadline has passed.
    """
    try:
        # Not `wait_for`, which creates a task for each chunk before Python 3.12.
        async with asyncio.timeout(work_of(request).seconds_left):
            return await anext(contents, None)
    except TimeoutError:
        raise RequestTimeoutError from None


def error_events(error: APIError, path: str) -> bytes:
    """The bytes that end a failed stream of the path, for a proxy that relays only bytes."""
    end = [] if path == "/v1/responses" else ["[DONE]"]
    data = [_event(error.body())["data"], *end]
    return b"".join(ServerSentEvent(each, sep="\n").encode() for each in data)


def _event(content: Mapping[str, Any]) -> dict[str, str]:
    event = {"data": json.dumps(content, ensure_ascii=False, separators=(",", ":"))}
    if "type" in content:
        event["event"] = content["type"]
    return event
