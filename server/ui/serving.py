"""Serves the page beside the API: its paths, headers and shutdown.

The page itself needs no API key and no place in the queue. Its calls of the API need both, as those
of any client do.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as ASGIMessage

from server.middleware import BodyMiddleware
from server.ui.client import OWN_SCHEME
from server.ui.page import build_page

PATHS = frozenset({"/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json"})
FOLDERS = ("/assets/", "/static/", "/svelte/", "/gradio_api/")

HEADERS = {
    "content-security-policy": "; ".join(
        [
            "default-src 'self'",
            # Gradio starts with inline scripts, and its plots compile code.
            "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "worker-src 'self' blob:",
            "object-src 'none'",
            "base-uri 'self'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        ]
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}


class PageMiddleware:
    """Sends requests for the page's paths to the page, all others to the application."""

    def __init__(self, app: ASGIApp, page: "Page") -> None:
        self._app, self._page = app, page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._page.answer if self._page.owns(scope) else self._app
        await answer(scope, receive, send)


class Page:
    """The page as an ASGI application."""

    middleware = PageMiddleware

    def __init__(self, max_body_bytes: int, scheme: str) -> None:
        """max_body_bytes: of an upload or an event. scheme: the server's own, http or https."""
        self._max_body_bytes = max_body_bytes
        self._scheme = scheme
        self._app: ASGIApp | None = None
        self._tasks: set[asyncio.Future[None]] = set()

    def owns(self, scope: Scope) -> bool:
        """Whether the request is for the page."""
        if scope["type"] != "http":
            return False
        path = scope["path"]
        if path.startswith("/gradio_api/"):
            return True
        return scope["method"] in ("GET", "HEAD") and (path in PATHS or path.startswith(FOLDERS))

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Builds the page and runs its queue until the block ends."""
        # Not earlier: without a running event loop Gradio creates some and never closes them.
        app = build_page()
        self._app = BodyMiddleware(app, self._max_body_bytes)
        async with app.router.lifespan_context(app):
            yield

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Returns when the response is complete or the page is closed."""
        assert self._app is not None
        is_open = False

        async def send_with_headers(message: ASGIMessage) -> None:
            nonlocal is_open
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            is_open = message["type"] == "http.response.start" or message.get("more_body", False)
            await send(message)

        scope[OWN_SCHEME] = self._scheme
        task = asyncio.ensure_future(self._app(scope, receive, send_with_headers))
        self._tasks.add(task)
        try:
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()
            elif is_open:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._tasks.discard(task)
            task.cancel()

    def close(self) -> None:
        """Ends all responses: an open page would keep its connections forever."""
        for task in self._tasks:
            task.cancel()
