"""Judges: label probabilities from the scores of the labels' texts, or from a linear head."""

import math
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from server.core.engine.adapters import BASE, Adapter
from server.core.engine.engine import Scores
from server.core.engine.work import Work
from server.core.roles.heads import LinearHead


class Scorer(Protocol):
    """The part of the engine that judges need."""

    def score(
        self,
        prompt_ids: list[int],
        continuations: list[list[int]],
        *,
        layers: tuple[int, ...] = (),
        num_shared: int = 0,
        is_pinned: bool = False,
        work: Work | None = None,
        adapter: Adapter = BASE,
    ) -> Awaitable[Scores]:
        """Log-probabilities (nats) of the continuations, and hidden states after the layers."""


@dataclass(frozen=True)
class CrossValidation:
    """Accuracy and log-loss (nats) on held-out examples."""

    num_examples: int
    accuracy: float
    log_loss: float


@dataclass(frozen=True)
class LabelJudge:
    """Scores the labels' texts after the prompt.

    prior: (K,) log-probabilities of the labels averaged over texts, in nats, which are subtracted
    from the scores. Empty: nothing is subtracted.
    """

    prior: tuple[float, ...] = ()
    temperature: float = 1.0
    validation: CrossValidation | None = None
    kind: Literal["label_scores"] = "label_scores"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose hidden states the judge needs."""
        return ()

    def probabilities(self, scores: Scores) -> list[float]:
        """Probabilities of the labels, in the task's order; they add up to 1."""
        logprobs = np.array(scores.logprobs)
        if self.prior:
            logprobs -= self.prior
        return _softmax((logprobs / self.temperature).tolist())


@dataclass(frozen=True)
class HeadJudge:
    """Applies a linear head to the hidden state of the last prompt token after a layer."""

    layer: int
    head: LinearHead
    validation: CrossValidation | None = None
    kind: Literal["head"] = "head"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose hidden states the judge needs."""
        return (self.layer,)

    def probabilities(self, scores: Scores) -> list[float]:
        """Probabilities of the labels, in the task's order; they add up to 1."""
        assert scores.hidden_states is not None
        return _softmax(self.head.scores(scores.hidden_states[0]).tolist())


Judge = LabelJudge | HeadJudge


def _softmax(scores: Sequence[float]) -> list[float]:
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]
