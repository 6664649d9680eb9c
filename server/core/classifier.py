"""The analyst: log-probability of each label after a task's prompt, and an LRU of results.

Labels are scored, never generated and parsed: there is always a valid one, and the same
text gives the same one.
"""

import asyncio
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from cachetools import LRUCache

from server.core.engine import Scores
from server.core.tasks import Label, Task
from server.core.tokenizer import ChatTemplateError, ChatTokenizer, Message
from server.errors import ContextLengthError, InvalidRequestError

# Characters, some milliseconds of encoding.
LONG_TEXT = 10_000
# They are computed in one step, and everybody else waits for it.
MAX_LABEL_TOKENS = 1024

T = TypeVar("T")


class Scorer(Protocol):
    """What the classifier needs of the engine."""

    def score(
        self,
        prompt_ids: list[int],
        continuations: list[list[int]],
        *,
        num_shared: int,
        is_pinned: bool,
    ) -> Awaitable[Scores]:
        """Log-probabilities (nats) of the continuations."""


@dataclass(frozen=True)
class Classification:
    """The label of one text. `probabilities` follow the task's labels and add up to 1.

    Of the prompt's tokens, `num_cached_tokens` needed no computing, and `num_kept_tokens` were
    computed for later prompts to begin with.
    """

    label: Label
    confidence: float
    probabilities: tuple[tuple[Label, float], ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_kept_tokens: int = 0
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
        self,
        scorer: Scorer,
        tokenizer: ChatTokenizer,
        *,
        max_context: int,
        cache_size: int,
        pinned_tasks: Iterable[Task] = (),
    ) -> None:
        """cache_size: number of results kept, 0 for none.

        pinned_tasks: those whose instruction the engine keeps computed for good.
        """
        self._scorer, self._tokenizer = scorer, tokenizer
        self._max_context = max_context
        # Not their names: what a client calls its own task must not make it one of these.
        self._pinned_versions = {task.version for task in pinned_tasks}
        # The model is not part of the key: a classifier lives and dies with one model.
        self._results: LRUCache[_Key, Classification] = LRUCache(cache_size)
        self._passes: dict[_Key, _Pass] = {}
        self._num_shared: LRUCache[str, int] = LRUCache(256)  # by task version
        self.num_hits = 0
        self.num_misses = 0
        # Of tasks of the server; what clients bring along has too many names.
        self.label_counts: Counter[tuple[str, str]] = Counter()

    async def classify(self, task: Task, text: str) -> Classification:
        """The label of `text`.

        Raises:
            ContextLengthError: the text is too long for the model.
        """
        text = normalise(text)
        key = (task.name, task.version, text)
        result = await self._once(key, lambda: self._compute(task, text))
        if task.version in self._pinned_versions:
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

        def ask(question: Task, ending_ids: list[int]) -> Coroutine[Any, Any, Classification]:
            return self._once(
                (question.name, question.version, about),
                lambda: self._score(
                    question, "questions", shared_ids + ending_ids, len(shared_ids)
                ),
            )

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
        """The result for the key: known, being computed for somebody else, or computed now."""
        if (result := self._results.get(key)) is not None:
            self.num_hits += 1
            return replace(result, is_cached=True)
        running = self._passes.get(key)
        is_joined = running is not None
        if running is None:
            self.num_misses += 1
            running = _Pass(asyncio.create_task(compute()))
            self._passes[key] = running
            running.task.add_done_callback(lambda done: self._finish(key, done))
        else:
            self.num_hits += 1
        running.num_waiters += 1
        try:
            return replace(await asyncio.shield(running.task), is_cached=is_joined)
        finally:
            running.num_waiters -= 1
            if running.num_waiters == 0 and not running.task.done():
                running.task.cancel()
                # Who comes now must not join a computation that is being cancelled.
                self._passes.pop(key, None)

    async def _compute(self, task: Task, text: str) -> Classification:
        messages = task.messages(text)
        try:
            prompt_ids = await _encoded(len(text), lambda: self._tokenizer.encode_chat(messages))
        except ChatTemplateError as error:
            raise _refused(error) from error
        num_shared = self._num_shared_tokens(task)
        is_pinned = task.version in self._pinned_versions
        return await self._score(task, "labels", prompt_ids, num_shared, is_pinned=is_pinned)

    async def _score(
        self,
        task: Task,
        labels_param: str,
        prompt_ids: list[int],
        num_shared: int,
        *,
        is_pinned: bool = False,
    ) -> Classification:
        """num_shared: first tokens that later prompts will have too."""
        label_ids = encode_labels(
            task, self._tokenizer, len(prompt_ids), self._max_context, labels_param
        )
        scores = await self._scorer.score(
            prompt_ids,
            label_ids,
            num_shared=num_shared,
            is_pinned=is_pinned,
        )
        num_kept = max(0, num_shared - scores.num_cached)
        return replace(_decide(task, scores, len(prompt_ids)), num_kept_tokens=num_kept)

    def _num_shared_tokens(self, task: Task) -> int:
        """How many tokens every prompt of the task begins with: its instruction."""
        if (known := self._num_shared.get(task.version)) is not None:
            return known
        one, other = (self._tokenizer.encode_chat(task.messages(text)) for text in ("a", "我"))
        count = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        self._num_shared[task.version] = count
        return count

    def _finish(self, key: _Key, done: asyncio.Task[Classification]) -> None:
        if (running := self._passes.get(key)) is not None and running.task is done:
            del self._passes[key]
        # exception() also marks it as seen, for a pass that nobody waits for any more.
        if not done.cancelled() and done.exception() is None and self._results.maxsize:
            self._results[key] = done.result()


def encode_labels(
    task: Task,
    tokenizer: ChatTokenizer,
    num_prompt_tokens: int,
    max_context: int,
    labels_param: str = "labels",
) -> list[list[int]]:
    """Ids of each label's text, to be laid behind a prompt.

    labels_param: where a request has its labels.

    Raises:
        InvalidRequestError: the labels are too long to be computed in one step.
        ContextLengthError: prompt and labels are too long for the model.
    """
    label_ids = [tokenizer.encode_text(label.text) for label in task.labels]
    num_label_tokens = sum(map(len, label_ids))
    if num_label_tokens > MAX_LABEL_TOKENS:
        raise InvalidRequestError(
            f"'{labels_param}': the labels to choose from have {num_label_tokens} tokens "
            f"together, of {MAX_LABEL_TOKENS} at most; use fewer or shorter ones.",
            param=labels_param,
        )
    # All labels but their last tokens are laid behind the prompt in one forward.
    num_tokens = num_prompt_tokens + num_label_tokens - len(label_ids)
    if num_tokens >= max_context:
        raise ContextLengthError(num_tokens, max_context, "input")
    return label_ids


async def all_of(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results, computed together. The first error ends the others and is raised itself."""
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [done.result() for done in running]


async def _encoded(num_characters: int, encode: Callable[[], T]) -> T:
    """Encodes at once what is short: a chat counts on it that its pass reaches the engine in the
    same turn of the event loop. Megabytes take a second, and are encoded beside it.
    """
    return await asyncio.to_thread(encode) if num_characters > LONG_TEXT else encode()


def normalise(text: str) -> str:
    """The form in which texts are judged and compared: NFC, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _refused(error: ChatTemplateError) -> InvalidRequestError:
    return InvalidRequestError(
        f"The model's chat template refuses this input: {error}.", param="input"
    )


def _decide(task: Task, scores: Scores, num_prompt_tokens: int) -> Classification:
    """Softmax over the labels; the fallback answers where the model is unsure.

    A label's log-probability is summed over its tokens, so their exponentials add up to
    the share of all possible answers that are labels at all (`min_label_mass`).
    """
    highest = max(scores.logprobs)
    weights = [math.exp(logprob - highest) for logprob in scores.logprobs]
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
        num_cached_tokens=scores.num_cached,
    )
