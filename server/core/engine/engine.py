"""What the event loop sees of an engine, wherever it computes: submit, score, prefill, close.

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
    """What was asked for about the end of a prompt, and how much of the prompt was known.

    logprobs: (nats) of every continuation.
    num_cached: prompt tokens that needed no computing; None: the engine does not report them.
    hidden_states: (L, C), of the last prompt token after each layer asked for, or None.
    """

    logprobs: list[float]
    num_cached: int | None
    hidden_states: NDArray[np.float32] | None = None


class Observer(Protocol):
    """Who wants to know how the engine does. Called on the engine's thread."""

    def token_sampled(self, seconds: float, *, is_first: bool) -> None:
        """seconds: since the sequence was submitted, or since its last token."""

    def sequence_ended(self, sequence: Sequence) -> None:
        """However it ended."""


class Engine(Protocol):
    """Computes sequences, never on the event loop.

    work: the request that a sequence belongs to; None: the sequence is one of its own.
    adapter: what the sequence is computed with beside the base model.
    Methods that start a sequence raise an EngineClosedError once the engine is closing.
    """

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, *, work: Work | None = None,
        adapter: Adapter = BASE,
    ) -> TokenStream:  # fmt: skip
        """Starts to continue the prompt. Call from the event loop."""

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
        """Scores each continuation after the prompt.

        layers: those whose hidden states are wanted, rising from 1. Without continuations the
        forward ends for this prompt after the last of them. None if `has_hidden_states` is false.
        num_shared: first tokens that later prompts will have too; they are computed once.
        is_pinned: whether these are kept for good.
        A cancelled call frees its slot.
        """

    async def prefill(
        self, prompt_ids: list[int], *, work: Work | None = None, adapter: Adapter = BASE
    ) -> int | None:
        """Computes the prompt, so that a sequence that begins with it starts sooner.

        Returns how many of its tokens were known already; None if the engine does not report
        them, or if the prompt is too long to be kept and was not computed. A cancelled call frees
        its slot.
        """

    def observe(self, observer: Observer) -> None:
        """Reports to the observer from now on."""

    @property
    def has_hidden_states(self) -> bool:
        """Whether `score` gives hidden states, by which heads judge."""

    @property
    def is_alive(self) -> bool:
        """Whether the engine still works on sequences."""

    @property
    def breakdown(self) -> Exception | None:
        """What ended the engine for good, if it was not closed."""

    @property
    def trouble(self) -> str | None:
        """Why the engine does not work, for people; None if it does, or was closed."""

    @property
    def num_running(self) -> int:
        """Sequences that are being computed."""

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for room, or for their request's turn."""

    @property
    def num_kv_tokens(self) -> int | None:
        """Tokens that the memory in use has room for; None: it is not known."""

    def close(self) -> None:
        """Aborts every sequence and ends the engine. May be called twice."""
