"""The analyst: the probability of each label of a text, and an LRU cache of results.

Labels are judged from what the model computes for the prompt, never generated and parsed, so there
is always a valid one.
"""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cachetools import LRUCache

from server.core.concurrency import SingleFlight, all_of
from server.core.engine.adapters import BASE, ONLY_BASE, Adapter
from server.core.engine.work import Work
from server.core.roles.classification import Classification, decide
from server.core.roles.fitting import measure_prior
from server.core.roles.judges import Judge, LabelJudge, Scorer
from server.core.roles.prompts import TaskPrompts, normalise
from server.core.roles.tasks import Task
from server.core.text.tokenizer import ChatTemplateError, ChatTokenizer, Message
from server.errors import ContextLengthError, InvalidRequestError

# Limit on the tasks whose prompts are kept, and on the judges fitted on first use: clients may
# describe any number of tasks.
MAX_CLIENT_TASKS = 256


_Key = tuple[str, str, str]


@dataclass(frozen=True)
class PreparedTexts:
    """Encoded texts for a task to judge.

    keys: of the results, one for each text. prompt_ids: of the prompts, by key; none for a text
    whose result was cached. label_ids: scored after each prompt.
    num_shared: number of first tokens that all prompts of the task share.
    """

    task: Task
    keys: list[_Key]
    prompt_ids: dict[_Key, list[int]]
    label_ids: list[list[int]]
    num_shared: int


class Classifier:
    """Labels texts. Belongs to one event loop.

    Concurrent calls with the same text share one computation, which is cancelled when no caller
    waits for it any more.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: ChatTokenizer,
        *,
        max_context: int,
        cache_size: int,
        judges: Mapping[str, Judge],
        fitters: Mapping[str, Callable[[], Coroutine[Any, Any, Judge]]] | None = None,
        adapters: Mapping[str, Adapter] = ONLY_BASE,
    ) -> None:
        """cache_size: number of results kept, 0 for none.

        judges: of the server's tasks, by task version; the engine keeps the computed
        instructions of these tasks.
        fitters: by task version. On the first use of a task without a judge, its fitter fits one
        and adds it to `judges`. For a task that a client describes, the prior is measured.
        adapters: by name; tasks may name them.
        """
        self._scorer, self._tokenizer = scorer, tokenizer
        self._max_context, self._adapters = max_context, adapters
        # By version, not by name: a client's own task may have the name of the server's.
        self._judges, self._fitters = judges, fitters or {}
        # The model is not part of the key: a classifier has one model.
        self._results: SingleFlight[_Key, Classification] = SingleFlight(cache_size)
        self._late_judges: SingleFlight[str, Judge] = SingleFlight(MAX_CLIENT_TASKS)
        # By task version; used by several threads.
        self._prompts: LRUCache[str, TaskPrompts] = LRUCache(MAX_CLIENT_TASKS)
        self._prompts_lock = threading.Lock()
        # Only of the server's tasks: the labels in clients' tasks are too many.
        self.label_counts: Counter[tuple[str, str]] = Counter()

    @property
    def num_hits(self) -> int:
        """The number of results that were cached, or shared with another call."""
        return self._results.num_hits

    @property
    def num_misses(self) -> int:
        """The number of results that were computed."""
        return self._results.num_misses

    def prepare(
        self, task: Task, texts: Sequence[str], param: Callable[[int], str] = lambda index: "input"
    ) -> PreparedTexts:
        """Encodes the texts for `judge`, except those whose labels are cached. Any thread.

        param: the request's field with the text of an index, for errors.

        Raises:
            ContextLengthError: a text is too long for the model.
            InvalidRequestError: the chat template refuses the task, or its labels are too long.
        """
        keys = [(task.name, task.version, normalise(text)) for text in texts]
        missing = {key: i for i, key in enumerate(keys) if key not in self._results}
        prompts = self._prompts_of(task)
        prompt_ids = {}
        try:
            for key, i in missing.items():
                ids = prompt_ids[key] = prompts.encode(key[-1])
                # Before the next text is encoded: the instruction may have megabytes.
                if len(ids) >= prompts.max_context:
                    raise ContextLengthError(len(ids), prompts.max_context, param(i))
            num_shared = prompts.num_shared if missing else 0
        except ChatTemplateError as error:
            raise _refused(error) from error
        longest = max(missing, key=lambda key: len(prompt_ids[key]), default=None)
        label_ids: list[list[int]] = []
        if longest is not None:
            judge = self._judges.get(task.version)
            if judge is None or judge.kind == "label_scores":
                input_param = param(missing[longest])
                label_ids = prompts.labels(len(prompt_ids[longest]), input_param=input_param)
        return PreparedTexts(task, keys, prompt_ids, label_ids, num_shared)

    async def judge(
        self, prepared: PreparedTexts, work: Work, num_texts: int | None = None
    ) -> list[Classification]:
        """The labels of the texts, which are computed as a batch.

        num_texts: `label_counts` counts only so many of the first texts; the rest are parts of
        these. None: it counts all.

        Raises: as `prepare`, for a text whose result has been dropped from the cache since.
        """
        task = prepared.task
        passes = [self._classify_one(prepared, key, work) for key in prepared.keys]
        # No task for a single pass: a chat relies on it to reach the engine in the same turn of
        # the event loop as the conversation.
        results = [await passes[0]] if len(passes) == 1 else await all_of(passes)
        if task.version in self._judges:
            for result in results[:num_texts]:
                self.label_counts[task.name, result.label.value] += 1
        return results

    async def classify(
        self, task: Task, text: str, work: Work | None = None
    ) -> Classification:  # fmt: skip
        """The label of one short text. Encodes it on the event loop. Raises as `prepare`."""
        [result] = await self.judge(self.prepare(task, [text]), work or Work())
        return result

    async def _classify_one(
        self, prepared: PreparedTexts, key: _Key, work: Work
    ) -> Classification:  # fmt: skip
        async def compute() -> Classification:
            own = prepared
            if key not in own.prompt_ids:
                # The result has been dropped from the cache since.
                own = await asyncio.to_thread(self.prepare, prepared.task, [key[-1]])
            return await self._compute(own, key, work)

        return await self._once(key, compute)

    async def _compute(self, prepared: PreparedTexts, key: _Key, work: Work) -> Classification:
        task = prepared.task
        judge = await self.judge_of(task, work)
        return await self._score(
            task, judge, prepared.prompt_ids[key],
            # The labels were encoded before the judge was known.
            prepared.label_ids if judge.kind == "label_scores" else [],
            prepared.num_shared, work, is_pinned=task.version in self._judges,
            adapter=self._adapters[task.adapter],
        )  # fmt: skip

    async def judge_of(self, task: Task, work: Work | None = None) -> Judge:
        """The judge of a task. If there is none yet, the caller waits until it is fitted.

        Raises:
            CheckpointError: the model computes nothing that a judge can be fitted to.
        """
        if (judge := self._judges.get(task.version)) is not None:
            return judge
        fit = self._fitters.get(task.version) or (
            lambda: measure_prior(self._scorer, self._prompts_of(task), work)
        )
        judge, _ = await self._late_judges.get(task.version, fit)
        return judge

    def _prompts_of(self, task: Task) -> TaskPrompts:
        with self._prompts_lock:
            if (prompts := self._prompts.get(task.version)) is None:
                prompts = TaskPrompts(
                    task, self._tokenizer, self._max_context, self._adapters[task.adapter]
                )
                self._prompts[task.version] = prompts
        return prompts

    async def answer(
        self,
        questions: Sequence[Task],
        conversation: Sequence[Message],
        work: Work | None = None,
    ) -> list[Classification]:
        """The labels of the questions, each asked after the same conversation.

        The first question that is not cached computes the conversation, which the rest reuse.

        Raises:
            ContextLengthError: the conversation and a question are too long for the model.
            InvalidRequestError: the chat template refuses the conversation.
        """
        work = work or Work()
        try:
            conversation_key, shared_ids, endings = await asyncio.to_thread(
                self._encode_questions, questions, conversation
            )
        except ChatTemplateError as error:
            raise _refused(error) from error

        def ask(i: int) -> Coroutine[Any, Any, Classification]:
            question, (ending_ids, label_ids) = questions[i], endings[i]
            prompt_ids = shared_ids + ending_ids
            return self._once(
                (question.name, question.version, conversation_key),
                lambda: self._score(
                    question, LabelJudge(), prompt_ids, label_ids, len(shared_ids), work
                ),
            )

        answers: list[Classification] = []
        while len(answers) < len(questions):
            answers.append(await ask(len(answers)))
            if not answers[-1].is_cached:
                break
        return answers + await all_of(map(ask, range(len(answers), len(questions))))

    def _encode_questions(
        self, questions: Sequence[Task], conversation: Sequence[Message]
    ) -> tuple[str, list[int], list[tuple[list[int], list[list[int]]]]]:
        """A key and the ids of the conversation; for each question, its own ids and its labels'."""
        endings = [{"role": "user", "content": question.instructions} for question in questions]
        # Before the conversation is rendered for each question.
        shortest = self._tokenizer.encode_chat([*conversation, {**endings[0], "content": ""}])
        if len(shortest) >= self._max_context:
            raise ContextLengthError(len(shortest), self._max_context, "input")
        shared_ids, endings_ids = self._tokenizer.encode_chats(conversation, endings)
        encoded = []
        for question, ids in zip(questions, endings_ids, strict=True):
            num_prompt_tokens = len(shared_ids) + len(ids)
            prompts = TaskPrompts(question, self._tokenizer, self._max_context)
            encoded.append((ids, prompts.labels(num_prompt_tokens, labels_param="questions")))
        return json.dumps(conversation), shared_ids, encoded

    async def warm_up(self, tasks: Iterable[Task]) -> None:
        """Computes the instructions of tasks that have a judge, before the first request."""
        for task in tasks:
            if task.version not in self._judges:
                continue
            prepared = self.prepare(task, [""])
            for key in prepared.prompt_ids:
                await self._compute(prepared, key, Work())

    async def _once(
        self, key: _Key, compute: Callable[[], Coroutine[Any, Any, Classification]]
    ) -> Classification:
        result, is_known = await self._results.get(key, compute)
        return replace(result, is_cached=is_known)

    async def _score(
        self, task: Task, judge: Judge, prompt_ids: list[int], label_ids: list[list[int]],
        num_shared: int, work: Work, *, is_pinned: bool = False, adapter: Adapter = BASE,
    ) -> Classification:  # fmt: skip
        """num_shared: number of first tokens that later prompts share."""
        scores = await self._scorer.score(
            prompt_ids,
            label_ids,
            layers=judge.layers,
            num_shared=num_shared,
            is_pinned=is_pinned,
            work=work,
            adapter=adapter,
        )
        num_kept = 0 if scores.num_cached is None else max(0, num_shared - scores.num_cached)
        return replace(decide(task, judge, scores, len(prompt_ids)), num_kept_tokens=num_kept)


def _refused(error: ChatTemplateError) -> InvalidRequestError:
    return InvalidRequestError(
        f"The model's chat template refuses this input: {error}.", param="input"
    )
