"""Shares computations among callers, and runs several at once. Knows only coroutines."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cachetools import LRUCache

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass
class _Flight(Generic[V]):
    """A running computation, and the number of callers that wait for it."""

    task: asyncio.Task[V]
    num_waiters: int = 0


class SingleFlight(Generic[K, V]):
    """An LRU cache whose misses are computed once. Belongs to one event loop.

    Concurrent calls with the same key share one computation, which is cancelled when no caller
    waits for it any more. Failures are not cached.
    """

    def __init__(self, max_size: int) -> None:
        """max_size: number of results kept, 0 for none."""
        self._results: LRUCache[K, V] = LRUCache(max_size)
        self._flights: dict[K, _Flight[V]] = {}
        self.num_hits = 0
        self.num_misses = 0

    def __contains__(self, key: K) -> bool:
        """Whether the result is cached. Does not count as a use."""
        return key in self._results

    async def get(
        self, key: K, compute: Callable[[], Coroutine[Any, Any, V]]
    ) -> tuple[V, bool]:  # fmt: skip
        """The result, and whether it was computed for an earlier call."""
        if (result := self._results.get(key)) is not None:
            self.num_hits += 1
            return result, True
        flight = self._flights.get(key)
        is_joined = flight is not None
        if flight is None:
            self.num_misses += 1
            flight = _Flight(asyncio.create_task(compute()))
            self._flights[key] = flight
            flight.task.add_done_callback(lambda done: self._finish(key, done))
        else:
            self.num_hits += 1
        flight.num_waiters += 1
        try:
            return await asyncio.shield(flight.task), is_joined
        finally:
            flight.num_waiters -= 1
            if flight.num_waiters == 0 and not flight.task.done():
                flight.task.cancel()
                # A later caller must not join a computation that is being cancelled.
                self._flights.pop(key, None)

    def _finish(self, key: K, done: asyncio.Task[V]) -> None:
        if (flight := self._flights.get(key)) is not None and flight.task is done:
            del self._flights[key]
        # exception() also marks the error as retrieved, even if no caller waits for it any more.
        if not done.cancelled() and done.exception() is None and self._results.maxsize:
            self._results[key] = done.result()


async def all_of(coroutines: Iterable[Coroutine[Any, Any, V]]) -> list[V]:
    """Runs the coroutines concurrently. The first error cancels the rest and is raised itself."""
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [done.result() for done in running]
