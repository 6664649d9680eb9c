"""The analyst: log-probability of each label after a task's prompt, and an LRU of results.

Labels are scored, never generated and parsed: there is always a valid one, and the same
text gives the same one.
"""

import asyncio
import math
import unicodedata
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cachetools import LRUCache

from server.core.tasks import Label, Task
from server.core.tokenizer import ChatTokenizer
from server.errors import ContextLengthError


class Scorer(Protocol):
    """What the classifier needs of the engine."""

    def score(
        self, prompt_ids: list[int], continuations: list[list[int]]
    ) -> Awaitable[list[float]]:
        """Log-probabilities (nats) of the continuations."""


@dataclass(frozen=True)
class Classification:
    """The label of one text. `probabilities` follow the task's labels and add up to 1."""

    label: Label
    confidence: float
    probabilities: tuple[tuple[Label, float], ...]
    num_prompt_tokens: int
    is_cached: bool = False


@dataclass
class _Pass:
    """A running computation and how many requests wait for it."""

    task: asyncio.Task[Classification]
    num_waiters: int = 0


_Key = tuple[str, str, str]


class Classifier:
    """Labels texts with the one model. Belongs to one event loop.

    Equal texts in flight are computed once; the computation stops when the last of those
    who wait for it has gone.
    """

    def __init__(
        self, scorer: Scorer, tokenizer: ChatTokenizer, *, max_context: int, cache_size: int
    ) -> None:
        """cache_size: number of results kept, 0 for none."""
        self._scorer, self._tokenizer = scorer, tokenizer
        self._max_context = max_context
        # The model is not part of the key: a classifier lives and dies with one model.
        self._results: LRUCache[_Key, Classification] = LRUCache(cache_size)
        self._passes: dict[_Key, _Pass] = {}
        self.num_hits = 0
        self.num_misses = 0

    async def classify(self, task: Task, text: str) -> Classification:
        """The label of `text`.

        Raises:
            ContextLengthError: the text is too long for the model.
        """
        text = normalise(text)
        key = (task.name, task.version, text)
        if (result := self._results.get(key)) is not None:
            self.num_hits += 1
            return replace(result, is_cached=True)
        running = self._passes.get(key)
        if running is None:
            self.num_misses += 1
            running = _Pass(asyncio.create_task(self._compute(task, text)))
            self._passes[key] = running
            running.task.add_done_callback(lambda done: self._finish(key, done))
        else:
            self.num_hits += 1
        running.num_waiters += 1
        try:
            return await asyncio.shield(running.task)
        finally:
            running.num_waiters -= 1
            if running.num_waiters == 0 and not running.task.done():
                running.task.cancel()
                # Who comes now must not join a computation that is being cancelled.
                self._passes.pop(key, None)

    async def _compute(self, task: Task, text: str) -> Classification:
        prompt_ids = self._tokenizer.encode_chat(task.messages(text))
        label_ids = [self._tokenizer.encode_text(label.text) for label in task.labels]
        num_tokens = len(prompt_ids) + max(map(len, label_ids)) - 1
        if num_tokens >= self._max_context:
            raise ContextLengthError(num_tokens, self._max_context, "input")
        logprobs = await self._scorer.score(prompt_ids, label_ids)
        return _decide(task, logprobs, len(prompt_ids))

    def _finish(self, key: _Key, done: asyncio.Task[Classification]) -> None:
        if (running := self._passes.get(key)) is not None and running.task is done:
            del self._passes[key]
        # exception() also marks it as seen, for a pass that nobody waits for any more.
        if not done.cancelled() and done.exception() is None and self._results.maxsize:
            self._results[key] = done.result()


def normalise(text: str) -> str:
    """The form in which texts are judged and compared: NFC, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _decide(task: Task, logprobs: Sequence[float], num_prompt_tokens: int) -> Classification:
    """Softmax over the labels; the fallback answers where the model is unsure.

    A label's log-probability is summed over its tokens, so their exponentials add up to
    the share of all possible answers that are labels at all (`min_label_mass`).
    """
    highest = max(logprobs)
    weights = [math.exp(logprob - highest) for logprob in logprobs]
    probabilities = [weight / sum(weights) for weight in weights]
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    label_mass = math.exp(highest) * sum(weights)
    is_unsure = label_mass < task.min_label_mass or probabilities[best] < task.min_confidence
    if is_unsure and task.fallback is not None:
        best = [label.value for label in task.labels].index(task.fallback)
    return Classification(
        label=task.labels[best],
        confidence=probabilities[best],
        probabilities=tuple(zip(task.labels, probabilities, strict=True)),
        num_prompt_tokens=num_prompt_tokens,
    )
