"""What the engine works on: token sequences, how to sample them, and how they end."""

import contextvars
import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from server.core.engine.adapters import BASE, Adapter
from server.core.engine.work import Work


class FinishReason(enum.Enum):
    """Why a sequence produced its last token. The values are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


class GrammarState(Protocol):
    """Where a completion stands in what it must look like."""

    def allowed(self) -> bytes:
        """A bit for each token id, the lowest first: whether it may come next."""

    def accept(self, token_id: int) -> None:
        """Goes on by a token that is allowed."""


class Grammar(Protocol):
    """What a completion must look like."""

    @property
    def text(self) -> str:
        """The same as llguidance reads it."""

    def begin(self) -> GrammarState:
        """The state before the first token."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. temperature 0 takes the likeliest and ignores the seed."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0  # 0: no limit
    repetition_penalty: float = 1.0  # 1: none
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids and what is added
    seed: int | None = None
    num_logprobs: int | None = None  # likeliest tokens told with each; None: not even its own
    logprob_token_ids: tuple[int, ...] = ()  # told in place of the likeliest, if there are any
    grammar: Grammar | None = None
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class TokenEvent:
    """One sampled token; the stop token itself is never delivered.

    logprob (nats) and those of the likeliest tokens, or of the tokens named, if they were asked
    for, are of the distribution before temperature and what cuts it off (top_k, top_p, min_p).
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class FinishedEvent:
    """Terminal: no more tokens will come."""

    reason: FinishReason


@dataclass(frozen=True)
class ScoredEvent:
    """Terminal: what was asked for about the end of the prompt.

    logprobs: log-probability (nats) of every continuation, in their order.
    hidden_states: (L, C), of the last prompt token after each of the sequence's layers; None if
    it has none.
    """

    logprobs: list[float]
    hidden_states: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class PrefilledEvent:
    """Terminal: the prompt is computed, and others may begin with it."""


@dataclass(frozen=True)
class FailedEvent:
    """Terminal: the engine could not go on with this sequence."""

    error: BaseException


@dataclass(frozen=True)
class AbortedEvent:
    """Terminal: somebody called `abort`."""


Terminal = FinishedEvent | ScoredEvent | PrefilledEvent | FailedEvent | AbortedEvent
Event = TokenEvent | Terminal


@dataclass(eq=False)
class Sequence:
    """One run of tokens through the model.

    With `params` the prompt is continued, with `continuations` these are scored behind it, with
    `layers` the hidden states after these layers are returned (1 is the first layer; they rise).
    With none of them the prompt is only computed, for others to begin with.
    `num_shared` first tokens of a scored prompt are worth keeping for the next one.
    """

    prompt_ids: list[int]
    params: SamplingParams | None = None
    continuations: list[list[int]] = field(default_factory=list)
    deliver: Callable[[Event], None] = lambda event: None  # set by the engine
    layers: tuple[int, ...] = ()
    num_shared: int = 0
    is_pinned: bool = False  # the shared tokens are never evicted
    work: Work = field(default_factory=Work)  # of the request it belongs to
    adapter: Adapter = BASE
    completion_ids: list[int] = field(default_factory=list)
    # Tokens whose keys and values are in the KV cache, and how many of these were there
    # before the sequence ran: None until it is admitted.
    num_computed: int = 0
    num_cached: int | None = None
    num_scored: int = 0  # continuations
    last_step: int = 0  # that computed any of it; kept by the scheduler
    # When it was made, or sampled its last token; in seconds of time.perf_counter.
    last_event_at: float = field(default_factory=time.perf_counter)
    # Of the request it belongs to, for what is logged on the engine's thread.
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    @property
    def depth(self) -> int | None:
        """The layer after which the sequence leaves the forward; None for the model's last."""
        return self.layers[-1] if self.layers and not self.continuations else None

    @property
    def is_scored(self) -> bool:
        """Whether it ends with a `ScoredEvent`."""
        return bool(self.continuations or self.layers)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and completion so far."""
        return self.prompt_ids + self.completion_ids

    @property
    def num_tokens(self) -> int:
        """Prompt and completion so far."""
        return len(self.prompt_ids) + len(self.completion_ids)

    def tokens(self, begin: int, end: int) -> list[int]:
        """Token ids of these positions."""
        split = len(self.prompt_ids)
        of_completion = self.completion_ids[max(begin - split, 0) : max(end - split, 0)]
        return self.prompt_ids[begin:end] + of_completion

    @property
    def num_uncomputed(self) -> int:
        """Tokens the model has not seen yet: 1 in decode, more in prefill."""
        return self.num_tokens - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether only the token sampled last is left to compute."""
        return bool(self.completion_ids) and self.num_uncomputed == 1
