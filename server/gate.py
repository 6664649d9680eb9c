"""Admits requests for work, up to a limit."""

import asyncio

from server.errors import OverloadedError, UnavailableError


class Gate:
    """Counts the admitted requests. Refuses more at the limit, or when closed."""

    def __init__(self, max_requests: int) -> None:
        self.num_requests = 0
        self.is_closed = False  # no more requests are admitted
        self._max_requests = max_requests
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @property
    def is_open(self) -> bool:
        """Whether one more request would be admitted."""
        return not self.is_closed and self.num_requests < self._max_requests

    def enter(self) -> None:
        """Admits a request; `leave` must be called when it ends.

        Raises:
            OverloadedError: the limit is reached.
            UnavailableError: the gate is closed.
        """
        if self.is_closed:
            raise UnavailableError
        if not self.is_open:
            raise OverloadedError(
                f"The server is busy with {self.num_requests} requests and its queue is full; "
                "try again shortly."
            )
        self.num_requests += 1
        self._is_empty.clear()

    def leave(self) -> None:
        """Ends an admitted request."""
        self.num_requests -= 1
        if not self.num_requests:
            self._is_empty.set()

    async def wait_until_empty(self) -> None:
        """Returns when there are no admitted requests."""
        await self._is_empty.wait()
