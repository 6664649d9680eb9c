"""The gate every request for work passes: how many are inside, and whether more may come."""

import asyncio

from server.errors import OverloadedError, UnavailableError


class Gate:
    """How many requests are inside, and whether more may come in."""

    def __init__(self, max_requests: int) -> None:
        self.num_requests = 0
        self.is_closed = False  # nobody comes in any more
        self._max_requests = max_requests
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @property
    def is_open(self) -> bool:
        """Whether one more would be let in."""
        return not self.is_closed and self.num_requests < self._max_requests

    def enter(self) -> None:
        """Lets one more in, who must leave.

        Raises:
            OverloadedError: there are enough.
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
        """One has been served."""
        self.num_requests -= 1
        if not self.num_requests:
            self._is_empty.set()

    async def wait_until_empty(self) -> None:
        """Returns when nobody is inside."""
        await self._is_empty.wait()
