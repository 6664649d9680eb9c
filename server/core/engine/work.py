"""A request in the engine: what its sequences share."""

import math
import time
from dataclasses import dataclass, field


@dataclass(eq=False)
class Work:
    """One request. Steps are shared among requests.

    Times are in seconds; points in time are those of `time.perf_counter`.
    """

    deadline: float = math.inf  # when the request times out
    arrived_at: float = field(default_factory=time.perf_counter)
    queue_s: float | None = None  # until its first sequence was admitted
    sentiment_s: float | None = None  # until its sentiment was known or had failed
    # Set by the scheduler: rows computed so far, and the last step that computed any.
    num_rows: int = 0
    last_step: int = 0
    refused_at: int | None = None  # the step since which its next sequence has not fitted

    @property
    def total_s(self) -> float:
        """Seconds since the request arrived."""
        return time.perf_counter() - self.arrived_at

    @property
    def seconds_left(self) -> float:
        """Seconds to the deadline; negative after it."""
        return self.deadline - time.perf_counter()
