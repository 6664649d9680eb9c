"""The entrance: checks every request, then sends it to a replica."""

import asyncio
from contextlib import aclosing

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send

from server.app import entrance_middleware, exception_handlers
from server.cluster.members import Members
from server.cluster.overview import Families, health_of, readiness_of
from server.cluster.routing import conversation_of
from server.cluster.settings import ClusterSettings
from server.errors import APIError, RequestTimeoutError
from server.logs import request_id
from server.metrics import Metrics
from server.middleware import FailureMiddleware
from server.routes.common import MAX_INLINE_BYTES
from server.routes.streaming import error_events

# The fields of a scope that are data.
DATA = ("type", "method", "scheme", "path", "raw_path", "query_string", "http_version", "client")


def create_entrance(settings: ClusterSettings, metrics: Metrics, members: Members) -> Starlette:
    """The entrance as an ASGI application."""
    app = Starlette(
        routes=[
            Route("/health", health, methods=["GET"]),
            Route("/ready", ready, methods=["GET"]),
            Route("/metrics", all_metrics, methods=["GET"]),
            Mount("/", Relay(members, settings.request_timeout)),
        ],
        middleware=[
            # Serve's proxy adds the id to the response.
            *entrance_middleware(settings, metrics, sends_id=False),
            Middleware(FailureMiddleware),
        ],
        exception_handlers=exception_handlers(),
    )
    app.state.members = members
    return app


async def health(request: Request) -> Response:
    """Whether any replica works, and the health of each."""
    state = health_of(await request.app.state.members.get_json("/health"))
    return JSONResponse(state, status_code=200 if state["status"] == "ok" else 503)


async def ready(request: Request) -> Response:
    """Whether a request would be admitted now."""
    state = readiness_of(await request.app.state.members.get_json("/ready"))
    return JSONResponse(state, status_code=200 if state["status"] == "ready" else 503)


async def all_metrics(request: Request) -> Response:
    """All metrics of all processes, in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(Families(await request.app.state.members.metrics()))
    # With many replicas this takes a while.
    text = await asyncio.to_thread(generate_latest, registry)
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


class Relay:
    """ASGI application that relays requests to replicas, within the deadline."""

    def __init__(self, members: Members, timeout_s: float) -> None:
        self._members, self._timeout_s = members, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, is_stream = await Request(scope, receive).body(), False

        async def send_and_check(message: Message) -> None:
            nonlocal is_stream
            if message["type"] == "http.response.start":
                content_type = Headers(raw=message["headers"]).get("content-type", "")
                is_stream = content_type.startswith("text/event-stream")
            await send(message)

        try:
            async with asyncio.timeout(self._timeout_s):
                await self._relay(scope, body, send_and_check)
        except (TimeoutError, APIError) as raised:
            error = raised if isinstance(raised, APIError) else RequestTimeoutError()
            if not is_stream:
                raise error from raised
            await send({"type": "http.response.body", "body": error_events(error, scope["path"])})

    async def _relay(self, scope: Scope, body: bytes, send: Send) -> None:
        conversation = await _conversation_of(scope["path"], body)
        async with aclosing(self._members.answer(_as_data(scope), body, conversation)) as messages:
            async for message in messages:
                await send(message)


async def _conversation_of(path: str, body: bytes) -> str:
    """Parses a long body in a thread."""
    if len(body) <= MAX_INLINE_BYTES:
        return conversation_of(path, body)
    return await asyncio.to_thread(conversation_of, path, body)


def _as_data(scope: Scope) -> Scope:
    """The scope without objects of this process, and with the request id as a header."""
    headers = MutableHeaders(scope=scope)
    headers["x-request-id"] = request_id.get()
    return {**{name: scope[name] for name in DATA if name in scope}, "headers": headers.raw}
