"""The analyst: the probability of each label of a text, and an LRU of results.

Labels are judged from what the model computed of the prompt, never generated and parsed: there
is always a valid one, and the same text gives the same one.
"""

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cachetools import LRUCache

from server.core.concurrency import SingleFlight, all_of
from server.core.engine.engine import Scores
from server.core.roles.fitting import measure_prior
from server.core.roles.judges import Judge, LabelJudge, Scorer
from server.core.roles.prompts import TaskPrompts, encode_labels, normalise
from server.core.roles.tasks import Label, Task
from server.core.text.tokenizer import ChatTemplateError, ChatTokenizer, Message
from server.errors import ContextLengthError, InvalidRequestError

# Characters, some milliseconds of encoding.
LONG_TEXT = 10_000
# Tasks that clients describe in their requests; the labels' prior of so many is kept.
MAX_CLIENT_TASKS = 256

T = TypeVar("T")


@dataclass(frozen=True)
class Classification:
    """The label of one text. `probabilities` follow the task's labels and add up to 1.

    score: the probability of the task's one pole minus that of the other, if it has poles.
    Of the prompt's tokens, `num_cached_tokens` needed no computing, and `num_kept_tokens` were
    computed for later prompts to begin with.
    """

    label: Label
    confidence: float
    probabilities: tuple[tuple[Label, float], ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_kept_tokens: int = 0
    score: float | None = None
    is_cached: bool = False


_Key = tuple[str, str, str]


class Classifier:
    """Labels texts with the one model. Belongs to one event loop.

    Equal texts in flight are computed once; the computation stops when the last of those
    who wait for it has gone.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: ChatTokenizer,
        *,
        max_context: int,
        cache_size: int,
        judges: Mapping[str, Judge],
    ) -> None:
        """cache_size: number of results kept, 0 for none.

        judges: of the server's tasks, by their version; the engine keeps the instructions of
        these computed for good. Other tasks get one of their own when they are first used.
        """
        self._scorer, self._tokenizer = scorer, tokenizer
        self._max_context = max_context
        # Not by names: what a client calls its own task must not make it one of these.
        self._judges = judges
        # The model is not part of the key: a classifier lives and dies with one model.
        self._results: SingleFlight[_Key, Classification] = SingleFlight(cache_size)
        self._client_judges: SingleFlight[str, Judge] = SingleFlight(MAX_CLIENT_TASKS)
        # Tokens that all prompts of a task begin with, by the task's version.
        self._num_shared: LRUCache[str, int] = LRUCache(MAX_CLIENT_TASKS)
        # Of tasks of the server; what clients bring along has too many names.
        self.label_counts: Counter[tuple[str, str]] = Counter()

    @property
    def num_hits(self) -> int:
        """Results that needed no computing of their own."""
        return self._results.num_hits

    @property
    def num_misses(self) -> int:
        """Results that were computed."""
        return self._results.num_misses

    async def classify(self, task: Task, text: str) -> Classification:
        """The label of `text`.

        Raises:
            ContextLengthError: the text is too long for the model.
        """
        text = normalise(text)
        key = (task.name, task.version, text)
        result = await self._once(key, lambda: self._compute(task, text))
        if task.version in self._judges:
            self.label_counts[task.name, result.label.value] += 1
        return result

    async def answer(
        self, questions: Sequence[Task], conversation: Sequence[Message]
    ) -> list[Classification]:
        """The labels of the questions, each asked behind the same conversation.

        One is computed before the others, which then begin with what it computed of the
        conversation.

        Raises:
            ContextLengthError: the conversation and a question are too long for the model.
            InvalidRequestError: the chat template refuses the conversation.
        """
        endings = [{"role": "user", "content": question.instructions} for question in questions]
        about = json.dumps(conversation)
        try:
            shared_ids, endings_ids = await _encoded(
                len(about) * len(endings), lambda: self._encode_all(conversation, endings)
            )
        except ChatTemplateError as error:
            raise _refused(error) from error

        judge = LabelJudge()

        async def compute(question: Task, ending_ids: list[int]) -> Classification:
            prompt_ids = shared_ids + ending_ids
            label_ids = self._label_ids(question, judge, prompt_ids, "questions")
            return await self._score(question, judge, prompt_ids, label_ids, len(shared_ids))

        def ask(question: Task, ending_ids: list[int]) -> Coroutine[Any, Any, Classification]:
            key = (question.name, question.version, about)
            return self._once(key, lambda: compute(question, ending_ids))

        asked = list(zip(questions, endings_ids, strict=True))
        answers: list[Classification] = []
        while len(answers) < len(asked):
            answers.append(await ask(*asked[len(answers)]))
            if not answers[-1].is_cached:
                break
        return answers + await all_of(ask(*each) for each in asked[len(answers) :])

    def _encode_all(
        self, conversation: Sequence[Message], endings: Sequence[Message]
    ) -> tuple[list[int], list[list[int]]]:
        # Before it is rendered once for each ending.
        shortest = self._tokenizer.encode_chat([*conversation, {**endings[0], "content": ""}])
        if len(shortest) >= self._max_context:
            raise ContextLengthError(len(shortest), self._max_context, "input")
        return self._tokenizer.encode_chats(conversation, endings)

    async def warm_up(self, tasks: Iterable[Task]) -> None:
        """Computes the tasks' instructions before anybody waits for them."""
        for task in tasks:
            await self._compute(task, "")

    def is_known(self, task: Task, text: str) -> bool:
        """Whether the label of `text` needs no computing. Does not count as a use."""
        return (task.name, task.version, normalise(text)) in self._results

    async def _once(
        self, key: _Key, compute: Callable[[], Coroutine[Any, Any, Classification]]
    ) -> Classification:
        result, is_known = await self._results.get(key, compute)
        return replace(result, is_cached=is_known)

    async def _compute(self, task: Task, text: str) -> Classification:
        version = task.version
        prompts = TaskPrompts(task, self._tokenizer, self._max_context)
        known = self._num_shared.get(version)
        try:
            prompt_ids, num_shared = await _encoded(
                len(task.instructions) + len(text),
                lambda: (prompts.encode(text), known or prompts.num_shared),
            )
        except ChatTemplateError as error:
            raise _refused(error) from error
        judge = self._judges.get(version)
        # Before anything is computed for the task: a text that does not fit is refused.
        label_ids = self._label_ids(task, judge, prompt_ids, "labels")
        self._num_shared[version] = num_shared
        if judge is None:
            judge, _ = await self._client_judges.get(
                version, lambda: measure_prior(self._scorer, prompts)
            )
        return await self._score(
            task, judge, prompt_ids, label_ids, num_shared, is_pinned=version in self._judges
        )

    def _label_ids(
        self, task: Task, judge: Judge | None, prompt_ids: list[int], labels_param: str
    ) -> list[list[int]]:
        """What the judge wants scored behind the prompt: the labels' texts, or nothing.

        Raises: as `encode_labels`.
        """
        if judge is None or judge.kind == "label_scores":
            return encode_labels(
                task, self._tokenizer, len(prompt_ids), self._max_context, labels_param
            )
        if len(prompt_ids) >= self._max_context:
            raise ContextLengthError(len(prompt_ids), self._max_context, "input")
        return []

    async def _score(
        self, task: Task, judge: Judge, prompt_ids: list[int], label_ids: list[list[int]],
        num_shared: int, *, is_pinned: bool = False,
    ) -> Classification:  # fmt: skip
        """num_shared: first tokens that later prompts will have too."""
        scores = await self._scorer.score(
            prompt_ids,
            label_ids,
            layers=judge.layers,
            num_shared=num_shared,
            is_pinned=is_pinned,
        )
        num_kept = max(0, num_shared - scores.num_cached)
        return replace(_decide(task, judge, scores, len(prompt_ids)), num_kept_tokens=num_kept)


async def _encoded(num_characters: int, encode: Callable[[], T]) -> T:
    """Encodes at once what is short: a chat counts on it that its pass reaches the engine in the
    same turn of the event loop. Megabytes take a second, and are encoded beside it.
    """
    return await asyncio.to_thread(encode) if num_characters > LONG_TEXT else encode()


def _refused(error: ChatTemplateError) -> InvalidRequestError:
    return InvalidRequestError(
        f"The model's chat template refuses this input: {error}.", param="input"
    )


def _decide(task: Task, judge: Judge, scores: Scores, num_prompt_tokens: int) -> Classification:
    """The likeliest label; the fallback answers where the model is unsure.

    A label's log-probability is summed over its tokens, so their exponentials add up to
    the share of all possible answers that are labels at all (`min_label_mass`).
    """
    probabilities = judge.probabilities(scores)
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    label_mass = sum(map(math.exp, scores.logprobs)) if scores.logprobs else 1.0
    is_unsure = label_mass < task.min_label_mass or probabilities[best] < task.min_confidence
    if is_unsure and task.fallback is not None:
        best = task.values.index(task.fallback)
    score = None
    if task.poles is not None:
        positive, negative = (probabilities[task.values.index(pole)] for pole in task.poles)
        score = positive - negative
    return Classification(
        label=task.labels[best],
        confidence=probabilities[best],
        probabilities=tuple(zip(task.labels, probabilities, strict=True)),
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=scores.num_cached,
        score=score,
    )
