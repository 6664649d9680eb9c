"""The entrance: checks every request, then has a replica answer it."""

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

# What of a scope is data.
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
    """Whether any replica works, and what each says."""
    told = health_of(await request.app.state.members.look("/health"))
    return JSONResponse(told, status_code=200 if told["status"] == "ok" else 503)


async def ready(request: Request) -> Response:
    """Whether a request that came now would be served."""
    told = readiness_of(await request.app.state.members.look("/ready"))
    return JSONResponse(told, status_code=200 if told["status"] == "ready" else 503)


async def all_metrics(request: Request) -> Response:
    """All numbers of all processes, in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(Families(await request.app.state.members.metrics()))
    # Of many replicas it takes a while.
    text = await asyncio.to_thread(generate_latest, registry)
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


class Relay:
    """ASGI application whose requests are answered by replicas, within the deadline."""

    def __init__(self, members: Members, timeout_s: float) -> None:
        self._members, self._timeout_s = members, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, is_stream = await Request(scope, receive).body(), False

        async def send_and_note(message: Message) -> None:
            nonlocal is_stream
            if message["type"] == "http.response.start":
                kind = Headers(raw=message["headers"]).get("content-type", "")
                is_stream = kind.startswith("text/event-stream")
            await send(message)

        try:
            async with asyncio.timeout(self._timeout_s):
                await self._relay(scope, body, send_and_note)
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
    """A long body is read off the event loop."""
    if len(body) <= MAX_INLINE_BYTES:
        return conversation_of(path, body)
    return await asyncio.to_thread(conversation_of, path, body)


def _as_data(scope: Scope) -> Scope:
    """The request without the objects of this process, and with its id."""
    headers = MutableHeaders(scope=scope)
    headers["x-request-id"] = request_id.get()
    return {**{name: scope[name] for name in DATA if name in scope}, "headers": headers.raw}
