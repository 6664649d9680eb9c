"""The events of a sequence, from the engine's thread to one reader on the event loop."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

from server.core.engine.sequence import (
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    TokenEvent,
)
from server.errors import UnavailableError

logger = logging.getLogger(__name__)


class EngineClosedError(UnavailableError):
    """The engine takes no more sequences."""


class SequenceAbortedError(UnavailableError):
    """The sequence was aborted before it was done."""


class TokenStream:
    """The tokens of one submitted sequence, for one reader.

    `finish_reason` is set once the iteration has ended by itself.
    """

    def __init__(
        self, abort: Callable[[], None], count_cached: Callable[[], int] = lambda: 0
    ) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.finish_reason: FinishReason | None = None
        self.abort = abort
        self._count_cached = count_cached

    @property
    def num_cached(self) -> int:
        """Prompt tokens that needed no computing; known once a first event has come."""
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
                    raise as_error(event)


def deliver(loop: asyncio.AbstractEventLoop, stream: TokenStream, event: Event) -> None:
    """Hands the event to the stream's reader. Any thread."""
    try:
        loop.call_soon_threadsafe(stream.events.put_nowait, event)
    except RuntimeError:
        # The loop has closed, and with it everyone who could read this.
        logger.debug("no event loop left to deliver %s", event)


async def last_event(stream: TokenStream) -> Event:
    """Waits for the end of a sequence that yields no tokens; leaving early aborts it."""
    try:
        return await stream.events.get()
    finally:
        stream.abort()


def as_error(event: Event) -> BaseException:
    """The exception for a terminal event that the reader did not expect."""
    assert not isinstance(event, TokenEvent)
    return event.error if isinstance(event, FailedEvent) else SequenceAbortedError()
