"""How long the parts of a request take. Knows neither HTTP nor what the parts do."""

import contextvars
import time
from dataclasses import dataclass, field


@dataclass
class Timings:
    """Seconds that the parts of one request took; None: not begun, or not over."""

    begun_at: float = field(default_factory=time.perf_counter)
    queue_s: float | None = None  # until the engine first took up one of its sequences
    sentiment_s: float | None = None

    @property
    def total_s(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self.begun_at


# Of the request that is being served. Passes by those between the request and the engine.
timings: contextvars.ContextVar[Timings | None] = contextvars.ContextVar("timings", default=None)


def note_queue(seconds: float) -> None:
    """A sequence of the request was taken up; only the first one counts."""
    current = timings.get()
    if current is not None and current.queue_s is None:
        current.queue_s = seconds


def note_sentiment(seconds: float) -> None:
    """The request's sentiment is known, or is known not to come."""
    if (current := timings.get()) is not None:
        current.sentiment_s = seconds
