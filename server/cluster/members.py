"""An entrance's access to all entrances and replicas of the cluster."""

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

STATUS_TIMEOUT_S = 5


class Members:
    """Calls one replica, or all processes."""

    def __init__(self, entrances: DeploymentHandle, replicas: DeploymentHandle) -> None:
        self._entrances, self._replicas = entrances, replicas

    async def answer(
        self, scope: Scope, body: bytes, conversation: str
    ) -> AsyncGenerator[Message, None]:
        """The ASGI messages of a replica's response. Closing the iterator aborts the request.

        conversation: requests with the same value go to the same replica, if it has room.

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

    async def get_json(self, path: str) -> list[dict[str, Any]]:
        """Each replica's response to GET `path`."""
        return await _call_all(self._replicas, "get_json", path)

    async def metrics(self) -> list[Metric]:
        """The metrics of all entrances and replicas."""
        entrances = await _call_all(self._entrances, "metrics")
        replicas = await _call_all(self._replicas, "metrics")
        return [metric for metrics in (*entrances, *replicas) for metric in metrics]


async def _call_all(handle: DeploymentHandle, method: str, *args: Any) -> list[Any]:
    """The results of all processes of a deployment.

    Leaves out processes that die, fail or do not answer in time.
    """
    # Not Serve's `results_async`: it returns nothing if one process does not answer.
    broadcast = handle.broadcast(method, *args)
    try:
        async with asyncio.timeout(STATUS_TIMEOUT_S):
            results = await broadcast._fetch_replica_results_async()
    except (DeploymentUnavailableError, TimeoutError):
        return []
    if not results:
        return []
    futures = [asyncio.ensure_future(result.get_async()) for result in results]
    done, pending = await asyncio.wait(futures, timeout=STATUS_TIMEOUT_S)
    for each in pending:
        each.cancel()
    for each in done:
        if (error := each.exception()) and not isinstance(error, RayActorError):
            logger.warning("%s() failed in a process of the cluster", method, exc_info=error)
    return [each.result() for each in done if each.exception() is None]
