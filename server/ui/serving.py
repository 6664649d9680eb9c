"""The page among the server's routes: which paths are its own, its headers, how it ends.

It stands before the API's key and gate: the page itself is no secret and no work, and what it
asks of the API comes back through both like anybody's request.
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
            # Gradio starts itself with inline scripts, and its plots compile theirs.
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
    """Gives the page what is the page's."""

    def __init__(self, app: ASGIApp, page: "Page") -> None:
        self._app, self._page = app, page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._page.answer if self._page.owns(scope) else self._app
        await answer(scope, receive, send)


class Page:
    """The page as an application of its own."""

    middleware = PageMiddleware

    def __init__(self, max_body_bytes: int, scheme: str) -> None:
        """max_body_bytes: of a file or a message to the page. scheme: what the server speaks."""
        self._max_body_bytes = max_body_bytes
        self._scheme = scheme
        self._app: ASGIApp | None = None
        self._answering: set[asyncio.Future[None]] = set()

    def owns(self, scope: Scope) -> bool:
        """Whether the request is the page's to answer."""
        if scope["type"] != "http":
            return False
        path = scope["path"]
        if path.startswith("/gradio_api/"):
            return True
        return scope["method"] in ("GET", "HEAD") and (path in PATHS or path.startswith(FOLDERS))

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Builds the page and starts its queue, which ends behind the block."""
        # Not before: without a running event loop Gradio makes some, and never closes them.
        app = build_page()
        self._app = BodyMiddleware(app, self._max_body_bytes)
        async with app.router.lifespan_context(app):
            yield

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers until the answer is complete or the page is closed."""
        assert self._app is not None
        is_open = False

        async def send_with_headers(message: ASGIMessage) -> None:
            nonlocal is_open
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            is_open = message["type"] == "http.response.start" or message.get("more_body", False)
            await send(message)

        scope[OWN_SCHEME] = self._scheme
        work = asyncio.ensure_future(self._app(scope, receive, send_with_headers))
        self._answering.add(work)
        try:
            await asyncio.wait([work])
            if not work.cancelled():
                work.result()
            elif is_open:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._answering.discard(work)
            work.cancel()

    def close(self) -> None:
        """Ends all answers: an open page would hold its connections for ever."""
        for work in self._answering:
            work.cancel()
