"""A replica: the server's application without entrance checks, called by the entrances."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

from prometheus_client.core import Metric
from ray import serve
from starlette.datastructures import Headers
from starlette.types import Message, Scope

from server.app import create_app
from server.cluster.exchange import exchange
from server.cluster.overview import labelled
from server.cluster.settings import ClusterSettings
from server.loading import load_services
from server.logs import configure_logs, request_id


class Replica:
    """One model and all routes, on one machine of the cluster."""

    # Serve awaits the constructor.
    async def __init__(self, settings: ClusterSettings) -> None:  # type: ignore[misc]
        configure_logs(settings.log_level, settings.log_format)
        self._name = serve.get_replica_context().replica_tag
        self._services = await asyncio.to_thread(load_services, settings)
        self._app = create_app(settings, self._services, has_entrance=False)
        self._lifespan = AsyncExitStack()
        await self._lifespan.enter_async_context(self._app.router.lifespan_context(self._app))

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """The ASGI messages of the response."""
        request_id.set(Headers(scope=scope)["x-request-id"])
        # Serve may close this generator at `yield`; without aclosing, only the garbage collector
        # would close the inner one.
        async with aclosing(exchange(self._app, scope, body)) as messages:
            async for message in messages:
                yield message

    async def get_json(self, path: str) -> dict[str, Any]:
        """The response to GET `path`, with the replica's name."""
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}
        messages = [message async for message in exchange(self._app, scope, b"")]
        body = b"".join(message.get("body", b"") for message in messages)
        return {"replica": self._name, **json.loads(body)}

    def metrics(self) -> list[Metric]:
        """The replica's metrics, each with the label `replica`."""
        return labelled(self._app.state.metrics.registry, self._name)

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises here.

        Raises:
            RuntimeError: the engine has broken down.
        """
        if (breakdown := self._services.engine.breakdown) is not None:
            raise RuntimeError(f"the engine broke down: {breakdown!r}")

    async def __del__(self) -> None:
        """Called by Serve after the last request."""
        await self._lifespan.aclose()
