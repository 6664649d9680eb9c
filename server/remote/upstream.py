"""The other server over HTTP: its answers as JSON, its failures as errors of ours.

Knows connections and statuses, nothing of what is asked.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from server.errors import (
    APIError,
    EngineFailedError,
    EngineUnreachableError,
    InvalidRequestError,
    OverloadedError,
)
from server.reasons import first_line

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
# Between two tries to connect. What was sent is never sent again: it may have been computed.
PAUSES_S = (0.1, 0.5, 1.0)
HEALTH_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Address:
    """Where the other server is, the key it wants, and how long an answer may take.

    url: without `/v1`. silence_s: until a next part of an answer comes.
    """

    url: str
    key: str | None = None
    silence_s: float = 600.0

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {} if self.key is None else {"authorization": f"Bearer {self.key}"}

    @property
    def timeout(self) -> httpx2.Timeout:
        """The caller's deadline ends most requests before this does."""
        return httpx2.Timeout(self.silence_s, connect=CONNECT_TIMEOUT_S, pool=None)


class Upstream:
    """Connections to the other server. Belongs to one event loop."""

    def __init__(self, address: Address) -> None:
        self._client = httpx2.AsyncClient(
            base_url=address.url,
            headers=address.headers,
            timeout=address.timeout,
            # The engine decides how much is asked at once.
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.aclose()

    async def answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A whole answer of /v1/completions. A call that is cancelled hangs up.

        Raises:
            APIError: there is none; as clients of this server are to be told.
        """
        with _told_as_ours():
            async with self._answered(body) as response:
                answer = json.loads(await response.aread())
        return answer if isinstance(answer, dict) else {}

    async def events(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a stream, up to its [DONE]. Raises as `answer`."""
        with _told_as_ours():
            async with self._answered(body) as response:
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    raise _failed("it answers with no stream of events")
                async for line in _lines(response):
                    if not line.startswith(b"data: "):
                        continue  # an empty line, or a comment that keeps the connection open
                    if (data := line.removeprefix(b"data: ")) == b"[DONE]":
                        return
                    event = json.loads(data)
                    if "error" in event:
                        raise _of_event(event["error"])
                    yield event
        # Cut off, though by the rules of HTTP.
        raise EngineUnreachableError

    async def trouble(self) -> str | None:
        """Why the other server is not healthy; None if it is."""
        try:
            response = await self._client.get("/health", timeout=HEALTH_TIMEOUT_S)
        except httpx2.RequestError as error:
            return f"it does not answer ({first_line(error) or type(error).__name__})"
        return None if response.is_success else f"its /health answers {response.status_code}"

    @asynccontextmanager
    async def _answered(self, body: Mapping[str, Any]) -> AsyncIterator[httpx2.Response]:
        """The response, its body not read yet. Leaving early closes the connection."""
        request = self._client.build_request("POST", "/v1/completions", json=body)
        response = await self._send(request)
        try:
            if not response.is_success:
                raise await _of_response(response)
            yield response
        finally:
            await response.aclose()

    async def _send(self, request: httpx2.Request) -> httpx2.Response:
        for pause_s in PAUSES_S:
            try:
                return await self._client.send(request, stream=True)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                await asyncio.sleep(pause_s)
        return await self._client.send(request, stream=True)


async def _lines(response: httpx2.Response) -> AsyncIterator[bytes]:
    """The lines of events; those of httpx2 also end at U+2028 and others, which JSON may hold."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")


@contextmanager
def _told_as_ours() -> Iterator[None]:
    """What goes wrong on the way, as clients of this server are to be told of it."""
    try:
        yield
    except httpx2.RequestError as error:
        logger.warning("the engine does not answer: %s", first_line(error) or type(error).__name__)
        raise EngineUnreachableError from error
    except json.JSONDecodeError as error:
        raise _failed("what it answers is no JSON") from error


async def _of_response(response: httpx2.Response) -> APIError:
    """The error of an answer that is none."""
    try:
        error = json.loads(await response.aread())["error"]
    except (ValueError, LookupError, TypeError):
        error = {}
    return _as_ours(response.status_code, error, response.headers.get("retry-after"))


def _of_event(error: Any) -> APIError:
    """The error in a stream that has begun; vLLM has the status as its code."""
    status = error.get("code") if isinstance(error, dict) else None
    return _as_ours(status if isinstance(status, int) else 500, error)


def _as_ours(status: int, error: Any, retry_after: str | None = None) -> APIError:
    error = error if isinstance(error, dict) else {}
    message, param = str(error.get("message") or f"it answers {status}"), error.get("param")
    match status:
        case 400 | 413 | 422:
            return InvalidRequestError(
                f"The engine behind this server refuses the request: {message}",
                param=param if isinstance(param, str) else None,
            )
        case 429:
            return _overloaded(retry_after)
        case 503:
            logger.warning("the engine is not available: %s", message)
            return EngineUnreachableError()
        case 401 | 403:
            return _failed(f"it refuses --engine-key ({message})")
    return _failed(message)


def _overloaded(retry_after: str | None) -> OverloadedError:
    error = OverloadedError("The engine behind this server is busy; try again shortly.")
    if retry_after is not None:
        error.headers = {"retry-after": retry_after}
    return error


def _failed(reason: str) -> EngineFailedError:
    logger.error("the engine failed on a request: %s", reason)
    return EngineFailedError()
