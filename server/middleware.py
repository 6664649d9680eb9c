"""What every request passes on its way in: an id, a clock, a key, a body, a place inside."""

import asyncio
import json
import logging
import re
import secrets
import time
import uuid
from collections.abc import Collection, Sequence
from urllib.parse import quote

from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.core.engine.timings import Timings, timings
from server.errors import (
    APIError,
    AuthenticationError,
    BodyTimeoutError,
    InternalError,
    RequestTooLargeError,
)
from server.gate import Gate
from server.logs import request_id
from server.metrics import Metrics

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("server.access")

OPEN_PATHS = ("/health",)
BODY_TIMEOUT_S = 60

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def error_response(error: APIError) -> Response:
    """The error in OpenAI's shape."""
    return Response(
        json.dumps(error.body(), ensure_ascii=False),
        status_code=error.status,
        headers=error.headers(),
        media_type="application/json",
    )


class RequestIdMiddleware:
    """Gives every request an id, its own or a new one; logs and counts it when it is answered."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Collection[str]) -> None:
        """routes: paths that are counted by name."""
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        own = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        request_id.set(own)
        begin, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = own
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            method, path, seconds = scope["method"], scope["path"], time.perf_counter() - begin
            # The path only: a query may hold what is nobody's business. Quoted, for a line break
            # in it would begin a line of its own.
            access_logger.info("%s %s %s %.3f s", method, quote(path), status or "left", seconds)
            route = path if path in self._routes else "other"
            self._metrics.request_answered(route, status, seconds)


class TimingsMiddleware:
    """Tells in the head of every response how long its parts took, as far as they are over."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own = Timings()
        timings.set(own)

        async def send_with_timings(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["server-timing"] = _server_timing(own)
            await send(message)

        await self._app(scope, receive, send_with_timings)


def _server_timing(own: Timings) -> str:
    """In milliseconds, as browsers read it: https://www.w3.org/TR/server-timing/."""
    parts = {"queue": own.queue_s, "sentiment": own.sentiment_s, "total": own.total_s}
    return ", ".join(
        f"{name};dur={1000 * seconds:.1f}" for name, seconds in parts.items() if seconds is not None
    )


class ApiKeyMiddleware:
    """Asks every request but those for OPEN_PATHS for one of the keys, if there are any."""

    def __init__(self, app: ASGIApp, keys: Sequence[SecretStr]) -> None:
        self._app = app
        self._keys = [key.get_secret_value().encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_guarded = scope["type"] == "http" and scope["path"] not in OPEN_PATHS
        if self._keys and is_guarded and not self._is_known(dict(scope["headers"])):
            error = AuthenticationError(
                "Missing or wrong API key; send it as 'Authorization: Bearer <key>'.",
                code="invalid_api_key",
            )
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_known(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # All keys are compared, in constant time each, so that timing tells nothing.
        matches = [secrets.compare_digest(given.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


class BodyMiddleware:
    """Reads the body before anything else is spent on the request, within the limits."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(Headers(scope=scope), receive)
        except APIError as error:
            await error_response(error)(scope, receive, send)
            return
        except ClientDisconnect:
            return
        is_read = False

        async def receive_again() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_again, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        error = RequestTooLargeError(
            f"The request body is larger than {self._max_bytes} bytes; send less."
        )
        # The HTTP parser has seen to it that this is a number.
        if int(headers.get("content-length", 0)) > self._max_bytes:
            raise error
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    body += message.get("body", b"")
                    if len(body) > self._max_bytes:
                        raise error
                    more = message.get("more_body", False)
        except TimeoutError:
            raise BodyTimeoutError(
                f"The request body did not come within {BODY_TIMEOUT_S} s."
            ) from None
        return bytes(body)


class AdmissionMiddleware:
    """Lets requests for work through the gate, and gives each its deadline."""

    def __init__(self, app: ASGIApp, gate: Gate, timeout_s: float) -> None:
        """timeout_s: from here to the end of the answer."""
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
            scope["deadline"] = asyncio.get_running_loop().time() + self._timeout_s
            await self._app(scope, receive, send)
        finally:
            self._gate.leave()


class FailureMiddleware:
    """The last resort: what nobody expected becomes a 500 like any other answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception:
            if has_begun:
                raise  # uvicorn logs it and closes the connection
            logger.exception("a request failed")
            error = InternalError("The server failed on this request; see its log.")
            await error_response(error)(scope, receive, send)
