"""The ASGI application: routes, lifespan, middleware, exception handlers."""

import importlib
import importlib.util
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.config import Settings
from server.errors import APIError, InvalidRequestError, MethodNotAllowedError, NotFoundError
from server.gate import Gate
from server.guards import ApiKeyMiddleware, HostMiddleware, is_loopback
from server.metrics import Metrics, StateCollector
from server.middleware import (
    AdmissionMiddleware,
    BodyMiddleware,
    FailureMiddleware,
    RequestIdMiddleware,
    WorkMiddleware,
    error_response,
)
from server.routes import ROUTES
from server.services import Services


def create_app(settings: Settings, services: Services, *, has_entrance: bool = True) -> Starlette:
    """The server as an ASGI application, which closes the engine when it shuts down.

    has_entrance: whether it includes `entrance_middleware`; False if an entrance in front does.
    """
    page, metrics = _load_page(settings), services.metrics
    gate = Gate(settings.max_num_seqs + settings.max_queue)
    metrics.registry.register(StateCollector(services.engine, services.classifier, gate))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await services.classifier.warm_up(services.tasks.values())
        async with AsyncExitStack() as stack:
            if page is not None:
                await stack.enter_async_context(page.lifespan())
            yield
        services.engine.close()

    app = Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        middleware=[
            *(entrance_middleware(settings, metrics, page) if has_entrance else ()),
            Middleware(WorkMiddleware),
            Middleware(AdmissionMiddleware, gate=gate, timeout_s=settings.request_timeout),
            # Innermost, so that a 500 also gets its request id and the CORS headers.
            Middleware(FailureMiddleware),
        ],
        exception_handlers=exception_handlers(),
    )
    app.state.services, app.state.page = services, page
    app.state.gate, app.state.metrics = gate, metrics
    return app


def entrance_middleware(
    settings: Settings, metrics: Metrics, page: Any = None, *, sends_id: bool = True
) -> list[Middleware]:
    """The middleware, in order, that a request passes before any work is done for it.

    sends_id: whether responses get the header x-request-id.
    """
    paths = {route.path for route in ROUTES if "{" not in route.path}
    around = [Middleware(RequestIdMiddleware, metrics=metrics, routes=paths, sends_id=sends_id)]
    if is_loopback(settings.host) and not settings.keys:
        names = (settings.host, *settings.allowed_host)
        around.append(Middleware(HostMiddleware, names=names))
    if page is not None:
        around.append(Middleware(page.middleware, page=page))
    return [
        *around,
        # Before the key, which a browser's preflight request does not have.
        Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-sentiment", "x-request-id", "retry-after", "server-timing"],
        ),
        Middleware(ApiKeyMiddleware, keys=settings.keys),
        Middleware(BodyMiddleware, max_bytes=settings.max_body_bytes),
    ]


def exception_handlers() -> dict[Any, Callable[[Request, Exception], Awaitable[Response]]]:
    """The handlers that answer the exceptions of routes."""
    return {
        APIError: _api_error,
        HTTPException: _http_exception,
        ClientDisconnect: _client_closed_request,
    }


def has_page_extra() -> bool:
    """Whether the packages that the page needs are installed."""
    return all(importlib.util.find_spec(name) for name in ("gradio", "openai"))


def _load_page(settings: Settings) -> Any:
    """The page, if it is enabled and its packages are installed; only then imports Gradio."""
    if not settings.ui or not has_page_extra():
        return None
    serving = importlib.import_module("server.ui.serving")
    return serving.Page(settings.max_body_bytes, settings.scheme)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error_response(error)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        reason = f"Unknown request URL: {where}. The base URL of a client is http://HOST:PORT/v1."
        return error_response(NotFoundError(reason, code="unknown_url"))
    if error.status_code == 405:
        response = error_response(
            MethodNotAllowedError(f"Not allowed: {where}.", code="method_not_allowed")
        )
        response.headers.update(error.headers or {})
        return response
    return error_response(InvalidRequestError(str(error.detail)))


async def _client_closed_request(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # as nginx logs it; no client receives it
