"""What the sequences of one request share in the engine."""

import math
import time
from dataclasses import dataclass, field


@dataclass(eq=False)
class Work:
    """All that one request makes the engine compute: the unit that steps are shared among.

    Times are in seconds; points in time are those of `time.perf_counter`.
    """

    deadline: float = math.inf  # when the request is given up
    arrived_at: float = field(default_factory=time.perf_counter)
    queue_s: float | None = None  # until the engine took up its first sequence
    sentiment_s: float | None = None  # until its sentiment was known, or known not to come
    # Kept by the scheduler: rows computed for it, and the last step that computed any.
    num_rows: int = 0
    last_step: int = 0
    refused_at: int | None = None  # the step since which a sequence of it has not fitted

    @property
    def total_s(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self.arrived_at

    @property
    def seconds_left(self) -> float:
        """Seconds to the deadline; negative behind it."""
        return self.deadline - time.perf_counter()
