"""Loads the judges of tasks: from the task's judge file, from the cache, or by fitting new ones.

If the engine has no hidden states, all tasks are judged by the scores of their labels.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from server.core.engine.adapters import BASE, ONLY_BASE, Adapter
from server.core.engine.checkpoint import CheckpointError
from server.core.roles.fitted_judges import read_fitted_judge
from server.core.roles.fitting import fit_judge, measure_prior
from server.core.roles.judge_cache import JudgeCache
from server.core.roles.judges import Judge, Scorer
from server.core.roles.prompts import TaskPrompts
from server.core.roles.tasks import Task
from server.core.text.tokenizer import ChatTokenizer
from server.errors import APIError
from server.reasons import first_line

logger = logging.getLogger(__name__)


class JudgeLoader:
    """Finds or fits the judges of tasks for one model, and collects them in `judges`.

    A task that chats do not need is fitted when it is first used, so that the start does not wait
    for it.
    """

    def __init__(
        self, scorer: Scorer, tokenizer: ChatTokenizer, cache: JudgeCache, *,
        num_layers: int, max_context: int, adapters: Mapping[str, Adapter] = ONLY_BASE,
    ) -> None:  # fmt: skip
        """num_layers, max_context: the model's. adapters: by name; tasks may name them."""
        self._scorer, self._tokenizer, self._cache = scorer, tokenizer, cache
        self._num_layers, self._max_context = num_layers, max_context
        self._adapters = adapters
        self.judges: dict[str, Judge] = {}  # by task version

    def find(self, tasks: Iterable[Task]) -> None:
        """Reads the judges of tasks that have a judge file or a cached judge.

        Raises:
            TaskFileError: a judge file is unreadable, or belongs to another task or model.
        """
        for task in tasks:
            if task.version not in self.judges and (judge := self._known(task)) is not None:
                self.judges[task.version] = judge

    def load(self, tasks: Iterable[Task]) -> None:
        """Finds the judges of the tasks, and fits the missing ones. Blocks.

        Raises:
            CheckpointError: a judge cannot be fitted.
            TaskFileError: as `find`.
        """
        tasks = list(tasks)
        self.find(tasks)
        missing = {task.version: task for task in tasks if task.version not in self.judges}
        if missing:
            _run(self._fit_all(list(missing.values())))

    async def fit(self, task: Task, report: Callable[[], object] = lambda: None) -> Judge:
        """Fits the judge of a task and caches it. report: called after each example.

        Raises:
            APIError: the engine is closing.
            CheckpointError: the judge cannot be fitted.
        """
        logger.info("fitting a judge for %s, once: 20 to 40 s for a 0.5B on two cores", task.name)
        prompts = self._prompts(task)
        # Off the event loop: hundreds of examples are encoded.
        path = await asyncio.to_thread(self._path, prompts)
        try:
            judge = await fit_judge(self._scorer, prompts, self._num_layers, report)
        except APIError:
            raise
        except Exception as error:
            raise _fit_error(task, error) from error
        self._cache.write(path, judge)
        self.judges[task.version] = judge
        return judge

    async def _fit_all(self, tasks: list[Task]) -> None:
        total = sum(len(self._prompts(task).examples[0]) for task in tasks)
        # disable=None: only on a terminal, so that it does not fill a log.
        with tqdm(total=total, desc="learning tasks", leave=False, disable=None) as bar:
            for task in tasks:
                try:
                    await self.fit(task, bar.update)
                except APIError as error:
                    raise _fit_error(task, error) from error

    def _known(self, task: Task) -> Judge | None:
        prompts = self._prompts(task)
        if task.judge is not None:
            return read_fitted_judge(task.judge, prompts, self._cache.model)
        return self._cache.read(self._path(prompts))

    def _prompts(self, task: Task) -> TaskPrompts:
        adapter = self._adapters[task.adapter]
        return TaskPrompts(task, self._tokenizer, self._max_context, adapter)

    def _path(self, prompts: TaskPrompts) -> Path:
        return self._cache.path(_key(prompts))


class PriorLoader:
    """Judges tasks by the scores of their labels' texts, minus their prior.

    For an engine without hidden states, to which no head can be fitted. Nothing is cached: the
    priors are measured quickly, and the engine's weights cannot be identified.
    """

    def __init__(self, scorer: Scorer, tokenizer: ChatTokenizer, *, max_context: int) -> None:
        self._scorer, self._tokenizer, self._max_context = scorer, tokenizer, max_context
        self.judges: dict[str, Judge] = {}  # by task version

    def load(self, tasks: Iterable[Task]) -> None:
        """Measures the priors of the tasks' labels. Blocks.

        Raises:
            CheckpointError: a prior cannot be measured.
        """
        for task in {task.version: task for task in tasks}.values():
            try:
                _run(self.fit(task))
            except APIError as error:
                raise _prior_error(task, error) from error

    async def fit(self, task: Task) -> Judge:
        """Measures the prior of a task's labels.

        Raises:
            APIError: the engine does not answer, or has no room.
            CheckpointError: the prior cannot be measured.
        """
        if task.judge is not None:
            logger.warning(
                "the engine has no hidden states: the task %s is judged by the scores of its "
                "labels, and its judge file is not used",
                task.name,
            )
        prompts = TaskPrompts(task, self._tokenizer, self._max_context)
        try:
            judge = await measure_prior(self._scorer, prompts)
        except APIError:
            raise
        except Exception as error:
            raise _prior_error(task, error) from error
        self.judges[task.version] = judge
        return judge


def _fit_error(task: Task, error: Exception) -> CheckpointError:
    return CheckpointError(f"the task {task.name!r} cannot be learned: {first_line(error)}")


def _prior_error(task: Task, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the labels of the task {task.name!r} cannot be scored: {first_line(error)}"
    )


def _run(work: Coroutine[Any, Any, object]) -> None:
    # On a separate thread, for the caller may be running an event loop.
    thread = ThreadPoolExecutor(1)
    try:
        thread.submit(asyncio.run, work).result()
    finally:
        # Without waiting: after an interrupt, the caller closes the engine, which ends the work.
        thread.shutdown(wait=False)


def _key(prompts: TaskPrompts) -> object:
    """All that a judge depends on but the model: task, examples, labels, references, adapter."""
    examples, all_ids = prompts.examples
    return [
        prompts.task.version,
        [
            [example.label, example.kind, ids]
            for example, ids in zip(examples, all_ids, strict=True)
        ],
        prompts.labels(0),
        None if examples else prompts.references,
        *([prompts.adapter.digest] if prompts.adapter is not BASE else []),
    ]
