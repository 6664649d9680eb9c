"""Token sequences, their sampling parameters, and their events."""

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
    """Why a sequence finished. The values are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"


class GrammarState(Protocol):
    """The state of a completion in its grammar."""

    def allowed(self) -> bytes:
        """A bit for each token id, the lowest first: whether the token may come next."""

    def accept(self, token_id: int) -> None:
        """Appends an allowed token."""


class Grammar(Protocol):
    """The grammar that a completion must follow."""

    @property
    def text(self) -> str:
        """The grammar in llguidance's format."""

    def begin(self) -> GrammarState:
        """The state before the first token."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled. Temperature 0 takes the likeliest token and ignores the seed."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0  # 0: no limit
    repetition_penalty: float = 1.0  # 1: none
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids and their biases
    seed: int | None = None
    num_logprobs: int | None = None  # likeliest tokens reported with each; None: no logprobs
    logprob_token_ids: tuple[int, ...] = ()  # reported instead of the likeliest, if any
    grammar: Grammar | None = None
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class TokenEvent:
    """One sampled token; the stop token itself is never delivered.

    logprob: (nats), if requested.
    top_logprobs: of the likeliest tokens, or of `logprob_token_ids`, if requested.
    Both are of the distribution before temperature, top_k, top_p and min_p.
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
    """Terminal: scores of the continuations, and hidden states of the prompt's last token.

    logprobs: log-probability (nats) of every continuation, in their order.
    hidden_states: (L, C), after each of the sequence's layers; None if it has none.
    """

    logprobs: list[float]
    hidden_states: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class PrefilledEvent:
    """Terminal: the prompt is computed and may be reused."""


@dataclass(frozen=True)
class FailedEvent:
    """Terminal: the sequence failed."""

    error: BaseException


@dataclass(frozen=True)
class AbortedEvent:
    """Terminal: the sequence was aborted, or the engine was closed."""


Terminal = FinishedEvent | ScoredEvent | PrefilledEvent | FailedEvent | AbortedEvent
Event = TokenEvent | Terminal


@dataclass(eq=False)
class Sequence:
    """A prompt, and what to compute of it.

    params: sample tokens after the prompt.
    continuations: score each after the prompt.
    layers: return the hidden states after these, ascending from 1.
    With none of the three the prompt is only computed, for reuse.
    num_shared: first tokens of a scored prompt to keep for later prompts.
    """

    prompt_ids: list[int]
    params: SamplingParams | None = None
    continuations: list[list[int]] = field(default_factory=list)
    deliver: Callable[[Event], None] = lambda event: None  # set by the engine
    layers: tuple[int, ...] = ()
    num_shared: int = 0
    is_pinned: bool = False  # the shared tokens are never evicted
    work: Work = field(default_factory=Work)  # its request
    adapter: Adapter = BASE
    completion_ids: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose keys and values are in the KV cache
    num_cached: int | None = None  # tokens cached when it was first admitted; None before
    num_scored: int = 0  # continuations
    last_step: int = 0  # the last step that computed any of it; set by the scheduler
    # When it was created or sampled its last token, in seconds of time.perf_counter.
    last_event_at: float = field(default_factory=time.perf_counter)
    # Its request's context, for logging on the engine's thread.
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    @property
    def depth(self) -> int | None:
        """The layer after which the sequence leaves the forward pass; None: the model's last."""
        return self.layers[-1] if self.layers and not self.continuations else None

    @property
    def is_scored(self) -> bool:
        """Whether it ends with a `ScoredEvent`."""
        return bool(self.continuations or self.layers)

    @property
    def token_ids(self) -> list[int]:
        """Ids of the prompt and the completion so far."""
        return self.prompt_ids + self.completion_ids

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the completion so far."""
        return len(self.prompt_ids) + len(self.completion_ids)

    def tokens(self, begin: int, end: int) -> list[int]:
        """Token ids of these positions."""
        split = len(self.prompt_ids)
        completion = self.completion_ids[max(begin - split, 0) : max(end - split, 0)]
        return self.prompt_ids[begin:end] + completion

    @property
    def num_uncomputed(self) -> int:
        """Tokens that are not computed yet: 1 in decode, more in prefill."""
        return self.num_tokens - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether only the token sampled last is left to compute."""
        return bool(self.completion_ids) and self.num_uncomputed == 1
