"""Passes the events of a sequence from the engine's thread to a reader on the event loop."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from server.core.engine.sequence import (
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    Terminal,
    TokenEvent,
)
from server.errors import UnavailableError

logger = logging.getLogger(__name__)

E = TypeVar("E", bound=Terminal)


class EngineClosedError(UnavailableError):
    """The engine accepts no more sequences."""


class SequenceAbortedError(UnavailableError):
    """The sequence was aborted before it finished."""


class TokenStream:
    """The tokens of one submitted sequence, for one reader on the event loop that creates it.

    `finish_reason` is set when the iteration ends without an error.
    """

    def __init__(
        self, abort: Callable[[], None], count_cached: Callable[[], int | None] = lambda: None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.finish_reason: FinishReason | None = None
        self.abort = abort
        self._count_cached = count_cached

    @property
    def num_cached(self) -> int | None:
        """Prompt tokens that were cached; None before the first event, or if not reported."""
        return self._count_cached()

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while True:
            match await self.events.get():
                case TokenEvent() as token:
                    yield token
                case FinishedEvent(reason):
                    self.finish_reason = reason
                    return
                case event:
                    raise _as_error(event)

    async def end(self, kind: type[E]) -> E:
        """Waits for the terminal event of a sequence without tokens; cancelling aborts it.

        Raises:
            SequenceAbortedError: the sequence was aborted. If it failed, its own error is raised.
        """
        try:
            event = await self.events.get()
        finally:
            self.abort()
        if not isinstance(event, kind):
            raise _as_error(event)
        return event

    def deliver(self, event: Event) -> None:
        """Passes the event to the reader. Thread-safe."""
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:
            # The loop is closed, so there is no reader.
            logger.debug("the event loop is closed, %s is dropped", event)


def _as_error(event: Event) -> BaseException:
    """The exception for a terminal event that the reader did not expect."""
    assert not isinstance(event, TokenEvent)
    return event.error if isinstance(event, FailedEvent) else SequenceAbortedError()
