"""All entrances and replicas of a cluster, as an entrance reaches them."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

from prometheus_client.core import Metric
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import Message, Scope

from server.errors import OverloadedError, ReplicaLostError, UnavailableError

logger = logging.getLogger(__name__)

LOOK_TIMEOUT_S = 5


class Members:
    """Asks one replica, or all."""

    def __init__(self, entrances: DeploymentHandle, replicas: DeploymentHandle) -> None:
        self._entrances, self._replicas = entrances, replicas

    async def answer(
        self, scope: Scope, body: bytes, conversation: str
    ) -> AsyncGenerator[Message, None]:
        """The ASGI messages with which a replica answers; it stops where they are not read on.

        conversation: requests with the same one go to the same replica, if it has room.

        Raises:
            OverloadedError: no replica has room, and the queue is full.
            UnavailableError: the replicas are being shut down.
            ReplicaLostError: the replica died.
        """
        handle = self._replicas.options(method_name="answer", stream=True, session_id=conversation)
        answer = handle.remote(scope, body)
        try:
            async for message in answer:
                yield message
        except BackPressureError as error:
            raise OverloadedError(
                "All replicas are busy and the queue is full; try again shortly."
            ) from error
        except DeploymentUnavailableError as error:
            raise UnavailableError from error
        except RayActorError as error:
            raise ReplicaLostError from error
        except BaseException:
            answer.cancel()
            raise

    async def look(self, path: str) -> list[dict[str, Any]]:
        """What each replica answers to a GET of the path."""
        return await _ask_all(self._replicas, "look", path)

    async def metrics(self) -> list[Metric]:
        """The numbers of all entrances and replicas."""
        entrances = await _ask_all(self._entrances, "metrics")
        replicas = await _ask_all(self._replicas, "metrics")
        return [metric for metrics in (*entrances, *replicas) for metric in metrics]


async def _ask_all(handle: DeploymentHandle, method: str, *args: Any) -> list[Any]:
    """What each process of a deployment returns.

    Those that are lost meanwhile, fail or are silent are left out: the others tell of themselves.
    """
    # Serve's `results_async` gives nothing if one process is silent.
    broadcast = handle.broadcast(method, *args)
    try:
        async with asyncio.timeout(LOOK_TIMEOUT_S):
            results = await broadcast._fetch_replica_results_async()
    except (DeploymentUnavailableError, TimeoutError):
        return []
    if not results:
        return []
    asked = [asyncio.ensure_future(result.get_async()) for result in results]
    done, silent = await asyncio.wait(asked, timeout=LOOK_TIMEOUT_S)
    for each in silent:
        each.cancel()
    for each in done:
        if (error := each.exception()) and not isinstance(error, RayActorError):
            logger.warning("a process of the cluster did not tell its %s", method, exc_info=error)
    return [each.result() for each in done if each.exception() is None]
