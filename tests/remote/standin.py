"""A stand-in for vLLM on loopback, with recorded answers of vLLM 0.32.

`python -m tests.remote.record` records them again, which is needed when the requests change.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

FILE = Path(__file__).parent / "vllm_0_32.jsonl"

Respond = Callable[[Request, Mapping[str, Any]], Awaitable[Response]]


@dataclass(frozen=True)
class Exchange:
    """A request and its answer."""

    method: str
    path: str
    body: Any
    status: int
    media_type: str
    answer: str

    @property
    def key(self) -> str:
        """The key of the request."""
        return key_of(self.method, self.path, self.body)


def key_of(method: str, path: str, body: Any) -> str:
    return json.dumps([method, path, body], sort_keys=True)


def read_recording() -> dict[str, Exchange]:
    """The exchanges by the key of the request."""
    exchanges = [Exchange(**json.loads(line)) for line in FILE.read_text("utf-8").splitlines()]
    return {exchange.key: exchange for exchange in exchanges}


@dataclass
class StandIn:
    """Gives recorded answers, or those of a test.

    respond: replaces the recording for /v1/completions. is_healthy: the state of /health. bodies:
    those of the requests to /v1/completions, in order.
    """

    respond: Respond | None = None
    is_healthy: bool = True
    key: str | None = None
    recording: dict[str, Exchange] = field(default_factory=read_recording)
    bodies: list[Any] = field(default_factory=list)

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/{path:path}", self._answer, methods=["GET", "POST"]),
            ]
        )

    async def _health(self, request: Request) -> Response:
        return Response(status_code=200 if self.is_healthy else 503)

    async def _answer(self, request: Request) -> Response:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, status_code=401)  # as vLLM does
        body = json.loads(await request.body() or "null")
        if request.url.path == "/v1/completions":
            self.bodies.append(body)
            if self.respond is not None:
                return await self.respond(request, body)
        exchange = self.recording.get(key_of(request.method, request.url.path, body))
        if exchange is None:
            message = f"not recorded: {json.dumps(body)[:2000]}; python -m tests.remote.record"
            return JSONResponse({"error": {"message": message, "code": 500}}, status_code=500)
        return Response(exchange.answer, exchange.status, media_type=exchange.media_type)


async def until_gone(request: Request) -> None:
    """Returns when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
