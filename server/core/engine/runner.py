"""What the engine needs of a model runner, and what a step gives back. No tensors in here."""

from collections.abc import Callable, Collection
from typing import Protocol

from server.core.engine.scheduler import ScheduledChunk
from server.core.engine.sequence import PrefilledEvent, ScoredEvent, Sequence, TokenEvent

# The result of a step for one sequence: one or more sampled tokens; or the scores it asked for; or
# the news that its prompt is computed.
StepResult = list[TokenEvent] | ScoredEvent | PrefilledEvent


class StepInterruptedError(Exception):
    """A step was given up between two layers; nothing of it counts."""


class Runner(Protocol):
    """What the engine needs of a model runner."""

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the memory in use has room for."""

    def step(
        self, chunks: list[ScheduledChunk], should_stop: Callable[[], bool]
    ) -> dict[Sequence, StepResult | Exception]:
        """Computes the chunks; a result, or what went wrong, for each that is its sequence's last.

        A result may hold several sampled tokens. The keys and values of all but the last are then
        in the cache. Only the last may be a stop token or reach `max_tokens`.
        A step that raises has sampled nothing: its chunks may be tried again.

        Raises:
            StepInterruptedError: `should_stop`, which is asked between layers, said so.
        """

    def admit(self, sequence: Sequence) -> int | None:
        """Makes room for the sequence; returns how many of its tokens are known already.

        None: there is no room now.
        """

    def fits(self, sequence: Sequence, without: Collection[Sequence]) -> bool:
        """Whether the sequence could be admitted if the others were suspended."""

    def reserve(self, sequence: Sequence) -> bool:
        """Makes room for an admitted sequence's next token; False if memory is short."""

    def suspend(self, sequence: Sequence) -> None:
        """Frees the sequence's memory; `admit` computes or copies it again."""

    def release(self, sequence: Sequence, *, is_sound: bool) -> None:
        """Frees what the sequence held; what it computed may be reused if it is sound.

        Harmless if it held nothing.
        """

    def is_kept(self, num_tokens: int) -> bool:
        """Whether a prompt of that length, once computed, is kept for others. Any thread."""

    def rest(self) -> None:
        """Returns free memory to the system. Called when the engine is idle."""
