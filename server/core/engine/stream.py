"""The events of a sequence, from the engine's thread to one reader on the event loop."""

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
    """The engine takes no more sequences."""


class SequenceAbortedError(UnavailableError):
    """The sequence was aborted before it was done."""


class TokenStream:
    """The tokens of one submitted sequence, for one reader on the event loop it is made on.

    `finish_reason` is set once the iteration has ended by itself.
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
        """Prompt tokens that needed no computing.

        None: no event has come yet, or another server computes and does not report them.
        """
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
        """The end of a sequence that yields no tokens; leaving early aborts it.

        Raises: what ended the sequence in place of such an event.
        """
        try:
            event = await self.events.get()
        finally:
            self.abort()
        if not isinstance(event, kind):
            raise _as_error(event)
        return event

    def deliver(self, event: Event) -> None:
        """Hands the event to the reader. Any thread."""
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:
            # The loop has closed, and with it everyone who could read this.
            logger.debug("no event loop left to deliver %s", event)


def _as_error(event: Event) -> BaseException:
    """The exception for a terminal event that the reader did not expect."""
    assert not isinstance(event, TokenEvent)
    return event.error if isinstance(event, FailedEvent) else SequenceAbortedError()
