"""Middleware: request ids and access log, timings, body limits, admission, failures."""

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Collection
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as ASGIMessage

from server.core.engine.work import Work
from server.errors import (
    APIError,
    BodyTimeoutError,
    InternalError,
    OverloadedError,
    RequestTooLargeError,
)
from server.gate import Gate
from server.logs import request_id
from server.metrics import Metrics

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("server.access")

BODY_TIMEOUT_S = 60
# Limit of all bodies in memory together, in bodies of the largest size.
MAX_BODIES = 16
# A body up to this size is read even beyond that limit: uvicorn has it in memory already.
SMALL_BODY_BYTES = 64 * 1024

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def error_response(error: APIError) -> Response:
    """The error in OpenAI's format."""
    return Response(
        json.dumps(error.body(), ensure_ascii=False),
        status_code=error.status,
        headers=error.headers,
        media_type="application/json",
    )


class RequestIdMiddleware:
    """Gives each request its client's id or a new one; logs and counts it when it is answered."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, routes: Collection[str], *, sends_id: bool = True
    ) -> None:
        """routes: paths that are counted by name. sends_id: whether the response has the id."""
        self._app, self._metrics, self._routes = app, metrics, routes
        self._sends_id = sends_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        id_ = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        request_id.set(id_)
        begin, status = time.perf_counter(), 0

        async def send_with_id(message: ASGIMessage) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._sends_id:
                    MutableHeaders(scope=message)["x-request-id"] = id_
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            method, path, seconds = scope["method"], scope["path"], time.perf_counter() - begin
            # Without the query, which may hold private data. Quoted, for a line break in the path
            # would begin a new line of the log.
            access_logger.info("%s %s %s %.3f s", method, quote(path), status or "left", seconds)
            route = path if path in self._routes else "other"
            self._metrics.request_answered(route, status, seconds)


class WorkMiddleware:
    """Gives every request its unit of work in the engine.

    Adds a `server-timing` header with the durations of the parts that are over by then.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        work = scope["work"] = Work()

        async def send_with_timings(message: ASGIMessage) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["server-timing"] = _server_timing(work)
            await send(message)

        await self._app(scope, receive, send_with_timings)


def _server_timing(work: Work) -> str:
    """The header's value, in milliseconds (https://www.w3.org/TR/server-timing/)."""
    parts = {"queue": work.queue_s, "sentiment": work.sentiment_s, "total": work.total_s}
    return ", ".join(
        f"{name};dur={1000 * seconds:.1f}" for name, seconds in parts.items() if seconds is not None
    )


class BodyMiddleware:
    """Reads the body, within limits, before any other work is done for the request."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        """max_bytes: of one body. All requests in progress share MAX_BODIES times as much."""
        self._app, self._max_bytes = app, max_bytes
        self._num_held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(Headers(scope=scope), receive)
        except APIError as error:
            # uvicorn discards the rest of the body. If the connection were closed instead, clients
            # would get that error in place of the answer.
            await error_response(error)(scope, receive, send)
            return
        except ClientDisconnect:
            return
        try:
            await self._app(scope, _before(receive, body), send)
        finally:
            self._num_held_bytes -= len(body)

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """The body, which counts as held. After an error, nothing of it counts."""
        too_large = RequestTooLargeError(
            f"The request body is larger than {self._max_bytes} bytes; send less."
        )
        # The HTTP parser has checked that this is a number.
        if int(headers.get("content-length", 0)) > self._max_bytes:
            raise too_large
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    part = message.get("body", b"")
                    body += part
                    self._num_held_bytes += len(part)
                    if len(body) > self._max_bytes:
                        raise too_large
                    is_full = self._num_held_bytes > MAX_BODIES * self._max_bytes
                    if is_full and len(body) > SMALL_BODY_BYTES:
                        raise OverloadedError(
                            "The server is busy with other requests, whose bodies fill its memory "
                            "for bodies; try again shortly."
                        )
                    more = message.get("more_body", False)
            return bytes(body)
        except BaseException as error:
            self._num_held_bytes -= len(body)
            if isinstance(error, TimeoutError):
                raise BodyTimeoutError(
                    f"The request body did not arrive within {BODY_TIMEOUT_S} s; send it faster."
                ) from None
            raise


def _before(receive: Receive, body: bytes) -> Receive:
    """Returns the body first, then what `receive` returns."""
    is_body_sent = False

    async def receive_body_first() -> ASGIMessage:
        nonlocal is_body_sent
        if is_body_sent:
            return await receive()
        is_body_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_body_first


class AdmissionMiddleware:
    """Admits requests for work through the gate, and sets their deadlines."""

    def __init__(self, app: ASGIApp, gate: Gate, timeout_s: float) -> None:
        """timeout_s: from the admission to the end of the answer."""
        self._app, self._gate, self._timeout_s = app, gate, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            self._gate.enter()
        except APIError as error:
            await error_response(error)(scope, receive, send)
            return
        try:
            scope["work"].deadline = time.perf_counter() + self._timeout_s
            await self._app(scope, receive, send)
        finally:
            self._gate.leave()


class FailureMiddleware:
    """Answers an unexpected exception with a 500 in OpenAI's format."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_and_note(message: ASGIMessage) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception:
            if has_begun:
                raise  # uvicorn logs it and closes the connection
            logger.exception("a request failed")
            await error_response(InternalError())(scope, receive, send)
