"""HTTP to the upstream server: returns its answers as JSON, raises its failures as our errors.

Knows connections and statuses, not the fields of requests.
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
# Between attempts to connect. A request that was sent is not repeated: it may have been computed.
PAUSES_S = (0.1, 0.5, 1.0)
HEALTH_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Address:
    """The upstream server's address, API key and read timeout.

    url: without `/v1`. read_timeout_s: for each part of an answer.
    """

    url: str
    key: str | None = None
    read_timeout_s: float = 600.0

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        return {} if self.key is None else {"authorization": f"Bearer {self.key}"}

    @property
    def timeout(self) -> httpx2.Timeout:
        """The timeouts of a request. The caller's own deadline is shorter as a rule."""
        return httpx2.Timeout(self.read_timeout_s, connect=CONNECT_TIMEOUT_S, pool=None)


class Upstream:
    """Connections to the upstream server. Belongs to one event loop."""

    def __init__(self, address: Address) -> None:
        self._client = httpx2.AsyncClient(
            base_url=address.url,
            headers=address.headers,
            timeout=address.timeout,
            # The engine limits the number of requests.
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.aclose()

    async def answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A complete answer of /v1/completions. Cancelling the call closes the connection.

        Raises:
            APIError: the request failed; the error is meant for clients of this server.
        """
        with _raises_api_errors():
            async with self._answered(body) as response:
                answer = json.loads(await response.aread())
        return answer if isinstance(answer, dict) else {}

    async def events(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a stream, up to its [DONE]. Raises as `answer`."""
        with _raises_api_errors():
            async with self._answered(body) as response:
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    raise _failed("its answer is not an event stream")
                async for line in _lines(response):
                    if not line.startswith(b"data: "):
                        continue  # an empty line, or a comment that keeps the connection open
                    if (data := line.removeprefix(b"data: ")) == b"[DONE]":
                        return
                    event = json.loads(data)
                    if "error" in event:
                        raise _error_of_event(event["error"])
                    yield event
        # The HTTP response is complete, but the stream has no [DONE].
        raise EngineUnreachableError

    async def trouble(self) -> str | None:
        """Why the upstream server is not healthy; None if it is."""
        try:
            response = await self._client.get("/health", timeout=HEALTH_TIMEOUT_S)
        except httpx2.RequestError as error:
            return f"it does not answer ({first_line(error) or type(error).__name__})"
        return None if response.is_success else f"its /health answers {response.status_code}"

    @asynccontextmanager
    async def _answered(self, body: Mapping[str, Any]) -> AsyncIterator[httpx2.Response]:
        """The response before its body is read. Leaving the block early closes the connection."""
        request = self._client.build_request("POST", "/v1/completions", json=body)
        response = await self._send(request)
        try:
            if not response.is_success:
                raise await _error_of_response(response)
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
    """The lines of a body. Unlike httpx2's, they do not end at U+2028, which JSON may contain."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")


@contextmanager
def _raises_api_errors() -> Iterator[None]:
    """Turns errors of the connection and the JSON parser into errors for clients."""
    try:
        yield
    except httpx2.RequestError as error:
        logger.warning("the engine does not answer: %s", first_line(error) or type(error).__name__)
        raise EngineUnreachableError from error
    except json.JSONDecodeError as error:
        raise _failed("its answer is not JSON") from error


async def _error_of_response(response: httpx2.Response) -> APIError:
    """The error of an unsuccessful response."""
    try:
        error = json.loads(await response.aread())["error"]
    except (ValueError, LookupError, TypeError):
        error = {}
    return _api_error(response.status_code, error, response.headers.get("retry-after"))


def _error_of_event(error: Any) -> APIError:
    """The error of an event in a stream. vLLM puts the status into `code`."""
    status = error.get("code") if isinstance(error, dict) else None
    return _api_error(status if isinstance(status, int) else 500, error)


def _api_error(status: int, error: Any, retry_after: str | None = None) -> APIError:
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
