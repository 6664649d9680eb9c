"""The interface of a model runner, and the results of a step. Knows no tensors."""

from collections.abc import Callable, Collection
from typing import Protocol

from server.core.engine.scheduler import ScheduledChunk
from server.core.engine.sequence import PrefilledEvent, ScoredEvent, Sequence, TokenEvent

# The result of a step for one sequence: one or more sampled tokens; or its scores; or that its
# prompt is computed.
StepResult = list[TokenEvent] | ScoredEvent | PrefilledEvent


class StepInterruptedError(Exception):
    """A step was interrupted between two layers; it counts as not computed."""


class Runner(Protocol):
    """Computes steps, and holds the memory of sequences."""

    @property
    def num_kv_tokens(self) -> int:
        """Capacity in tokens of the memory in use."""

    def step(
        self, chunks: list[ScheduledChunk], should_stop: Callable[[], bool]
    ) -> dict[Sequence, StepResult | Exception]:
        """Computes the chunks; returns a result or an error for each that is its sequence's last.

        A result may hold several sampled tokens. The keys and values of all but the last are then
        in the cache. Only the last may be a stop token or reach `max_tokens`.
        A step that raises has sampled nothing: its chunks may be computed again.

        Raises:
            StepInterruptedError: `should_stop`, called between layers, returned True.
        """

    def admit(self, sequence: Sequence) -> int | None:
        """Allocates memory for the sequence; returns how many of its tokens are cached.

        None: memory is short.
        """

    def fits(self, sequence: Sequence, without: Collection[Sequence]) -> bool:
        """Whether the sequence could be admitted if those of `without` were suspended."""

    def reserve(self, sequence: Sequence) -> bool:
        """Makes room for an admitted sequence's next token; False if memory is short."""

    def suspend(self, sequence: Sequence) -> None:
        """Frees the sequence's memory; a later `admit` resumes it."""

    def release(self, sequence: Sequence, *, is_sound: bool) -> None:
        """Frees the sequence's memory; no effect if it has none.

        is_sound: whether its keys and values may be reused.
        """

    def is_kept(self, num_tokens: int) -> bool:
        """Whether a prompt of that length is cached once it is computed. Thread-safe."""

    def rest(self) -> None:
        """Returns free memory to the system. Called when the engine is idle."""
