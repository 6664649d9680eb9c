"""The ASGI application: route table, lifespan, error handlers, access."""

import json
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.config import Settings
from server.core.engine import EngineClosedError, SequenceAbortedError
from server.errors import (
    APIError,
    AuthenticationError,
    InternalError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    UnavailableError,
)
from server.routes import ROUTES
from server.services import Services

OPEN_PATHS = ("/health",)


def create_app(settings: Settings, services: Services) -> Starlette:
    """The server as an ASGI application; it closes the engine when it shuts down."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await services.classifier.warm_up(services.tasks.values())
        yield
        services.engine.close()

    app = Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        middleware=[Middleware(ApiKeyMiddleware, keys=settings.api_key)],
        exception_handlers={
            APIError: _api_error,
            HTTPException: _http_exception,
            EngineClosedError: _stopping,
            SequenceAbortedError: _stopping,
            Exception: _unexpected,
        },
    )
    app.state.services = services
    app.state.max_body_bytes = settings.max_body_bytes
    return app


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


def error_response(error: APIError) -> Response:
    """The error in OpenAI's shape."""
    return Response(
        json.dumps(error.body(), ensure_ascii=False),
        status_code=error.status,
        headers=error.headers(),
        media_type="application/json",
    )


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error_response(error)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return error_response(NotFoundError(f"Unknown request URL: {where}.", code="unknown_url"))
    if error.status_code == 405:
        response = error_response(
            MethodNotAllowedError(f"Not allowed: {where}.", code="method_not_allowed")
        )
        response.headers.update(error.headers or {})
        return response
    return error_response(InvalidRequestError(str(error.detail)))


async def _stopping(request: Request, error: Exception) -> Response:
    return error_response(UnavailableError("The server is shutting down; try again shortly."))


async def _unexpected(request: Request, error: Exception) -> Response:
    # Starlette raises it again behind this answer, and uvicorn logs it.
    return error_response(InternalError("The server failed on this request; see its log."))
