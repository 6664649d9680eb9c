"""The interface of an engine, local or remote: submit, score, prefill, close.

Knows token ids, not text and not sentiment.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from server.core.engine.adapters import BASE, Adapter
from server.core.engine.sequence import SamplingParams, Sequence
from server.core.engine.stream import TokenStream
from server.core.engine.work import Work


@dataclass(frozen=True)
class Scores:
    """Scores of continuations, and hidden states of the prompt's last token.

    logprobs: (nats) of every continuation.
    num_cached: prompt tokens that were cached; None: the engine does not report them.
    hidden_states: (L, C), after each of the requested layers, or None.
    """

    logprobs: list[float]
    num_cached: int | None
    hidden_states: NDArray[np.float32] | None = None


class Observer(Protocol):
    """Receives the engine's measurements. Called on the engine's thread."""

    def token_sampled(self, seconds: float, *, is_first: bool) -> None:
        """seconds: since the sequence was submitted, or since its last token."""

    def sequence_ended(self, sequence: Sequence) -> None:
        """Called once for each sequence, however it ended."""


class Engine(Protocol):
    """Computes sequences outside the event loop.

    work: the sequence's request; None: one of its own.
    adapter: used beside the base model.
    Methods that start a sequence raise `EngineClosedError` once the engine is closing.
    """

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, *, work: Work | None = None,
        adapter: Adapter = BASE,
    ) -> TokenStream:  # fmt: skip
        """Starts to sample tokens after the prompt. Call it on the event loop."""

    async def score(
        self,
        prompt_ids: list[int],
        continuations: list[list[int]],
        *,
        layers: tuple[int, ...] = (),
        num_shared: int = 0,
        is_pinned: bool = False,
        work: Work | None = None,
        adapter: Adapter = BASE,
    ) -> Scores:
        """Scores each continuation after the prompt. A cancelled call frees its slot.

        layers: return hidden states after these, ascending from 1; needs `has_hidden_states`.
        Without continuations the forward pass ends for this prompt after the last of them.
        num_shared: first tokens that later prompts share; they are computed once.
        is_pinned: whether the shared tokens are never evicted from the prefix cache.
        """

    async def prefill(
        self, prompt_ids: list[int], *, work: Work | None = None, adapter: Adapter = BASE
    ) -> int | None:
        """Computes the prompt, so that a sequence that begins with it starts sooner.

        Returns how many of its tokens were cached already; None if the engine does not report
        them, or if the prompt is too long for the cache and was not computed. A cancelled call
        frees its slot.
        """

    def observe(self, observer: Observer) -> None:
        """Sets the observer."""

    @property
    def has_hidden_states(self) -> bool:
        """Whether `score` returns hidden states, which heads classify by."""

    @property
    def is_alive(self) -> bool:
        """Whether the engine still computes sequences."""

    @property
    def breakdown(self) -> Exception | None:
        """The exception that ended the engine, or None."""

    @property
    def trouble(self) -> str | None:
        """Why the engine does not work, as a message; None if it works or was closed."""

    @property
    def num_running(self) -> int:
        """Sequences that are being computed."""

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for memory, or for their request's turn."""

    @property
    def num_kv_tokens(self) -> int | None:
        """Capacity in tokens of the memory in use; None: unknown."""

    def close(self) -> None:
        """Aborts every sequence and ends the engine. Idempotent."""
