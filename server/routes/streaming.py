"""Server-sent events: how every stream begins, fails and ends."""

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
# A client that reads nothing for so long is gone; what it did not read is kept until then.
SEND_TIMEOUT_S = 60


def stream(
    request: Request,
    contents: AsyncIterator[Mapping[str, Any]],
    abort: Callable[[], None],
    headers: Mapping[str, str],
    *,
    end: str | None = "[DONE]",
) -> EventSourceResponse:
    """One event for each of the contents, which may have a `type` to name it by.

    Ends with an error when the request's deadline passes.
    abort: ends the work behind the contents, however the stream ends.
    end: the data of a last event, even behind an error.
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
    # Dicts, for a ServerSentEvent would bring a line separator of its own, CRLF.
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
    """The next content; None behind the last. A deadline that passes ends them all."""
    try:
        # Not `wait_for`, which before Python 3.12 makes a task for each chunk.
        async with asyncio.timeout(work_of(request).seconds_left):
            return await anext(contents, None)
    except TimeoutError:
        raise RequestTimeoutError from None


def error_events(error: APIError, path: str) -> bytes:
    """How a stream of the path ends that fails, for who has but its bytes."""
    ends = [] if path == "/v1/responses" else ["[DONE]"]
    data = [_event(error.body())["data"], *ends]
    return b"".join(ServerSentEvent(each, sep="\n").encode() for each in data)


def _event(content: Mapping[str, Any]) -> dict[str, str]:
    event = {"data": json.dumps(content, ensure_ascii=False, separators=(",", ":"))}
    if "type" in content:
        event["event"] = content["type"]
    return event
