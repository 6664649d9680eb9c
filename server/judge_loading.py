"""Gives tasks their judges: those they bring, those kept from an earlier start, or new ones.

Where the engine gives no hidden states, the scores of their labels judge all tasks.
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
    """Finds the judges of tasks for one model, or fits them; those that are there are in `judges`.

    A task that a chat does not need is fitted when it is first used, so that a start does not
    wait for it.
    """

    def __init__(
        self, scorer: Scorer, tokenizer: ChatTokenizer, cache: JudgeCache, *,
        num_layers: int, max_context: int, adapters: Mapping[str, Adapter] = ONLY_BASE,
    ) -> None:  # fmt: skip
        """num_layers, max_context: the model's. adapters: by their names, which tasks may have."""
        self._scorer, self._tokenizer, self._cache = scorer, tokenizer, cache
        self._num_layers, self._max_context = num_layers, max_context
        self._adapters = adapters
        self.judges: dict[str, Judge] = {}  # by the version of their task

    def find(self, tasks: Iterable[Task]) -> None:
        """Takes over the judges that tasks bring, or that an earlier start has kept.

        Raises:
            TaskFileError: the judge that a task brings does not belong to the task or the model.
        """
        for task in tasks:
            if task.version not in self.judges and (judge := self._known(task)) is not None:
                self.judges[task.version] = judge

    def load(self, tasks: Iterable[Task]) -> None:
        """Finds the judges of the tasks, and fits those that are not there. Blocks.

        Raises:
            CheckpointError: the model computes nothing that a judge can be fitted to.
            TaskFileError: as `find`.
        """
        tasks = list(tasks)
        self.find(tasks)
        missing = {task.version: task for task in tasks if task.version not in self.judges}
        if missing:
            _run(self._fit_all(list(missing.values())))

    async def fit(self, task: Task, report: Callable[[], object] = lambda: None) -> Judge:
        """Fits the judge of a task and keeps it. report: called after each example.

        Raises:
            APIError: the engine is closing.
            CheckpointError: the model computes nothing that a judge can be fitted to.
        """
        logger.info("fitting a judge for %s; it is kept for later starts", task.name)
        prompts = self._prompts(task)
        # Off the event loop: hundreds of examples are encoded.
        path = await asyncio.to_thread(self._path, prompts)
        try:
            judge = await fit_judge(self._scorer, prompts, self._num_layers, report)
        except APIError:
            raise
        except Exception as error:
            raise _unlearned(task, error) from error
        self._cache.write(path, judge)
        self.judges[task.version] = judge
        return judge

    async def _fit_all(self, tasks: list[Task]) -> None:
        total = sum(len(self._prompts(task).examples[0]) for task in tasks)
        # disable=None: on a terminal only, so that no log is full of it.
        with tqdm(total=total, desc="learning tasks", leave=False, disable=None) as bar:
            for task in tasks:
                try:
                    await self.fit(task, bar.update)
                except APIError as error:
                    raise _unlearned(task, error) from error

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
    """Judges tasks by the scores of their labels' texts, the prior taken off.

    For an engine without hidden states, to which no head can be fitted. Nothing is kept: the
    priors are measured in a moment, and nobody knows the weights that they are of.
    """

    def __init__(self, scorer: Scorer, tokenizer: ChatTokenizer, *, max_context: int) -> None:
        self._scorer, self._tokenizer, self._max_context = scorer, tokenizer, max_context
        self.judges: dict[str, Judge] = {}  # by the version of their task

    def load(self, tasks: Iterable[Task]) -> None:
        """Measures the priors of these tasks' labels. Blocks.

        Raises:
            CheckpointError: they cannot be measured.
        """
        for task in {task.version: task for task in tasks}.values():
            try:
                _run(self.fit(task))
            except APIError as error:
                raise _unscored(task, error) from error

    async def fit(self, task: Task) -> Judge:
        """Measures the prior of a task's labels.

        Raises:
            APIError: the engine does not answer, or has no room.
            CheckpointError: it cannot be measured.
        """
        if task.judge is not None:
            logger.warning(
                "the task %s is judged by the scores of its labels in place of the judge it "
                "brings: the engine gives no hidden states",
                task.name,
            )
        prompts = TaskPrompts(task, self._tokenizer, self._max_context)
        try:
            judge = await measure_prior(self._scorer, prompts)
        except APIError:
            raise
        except Exception as error:
            raise _unscored(task, error) from error
        self.judges[task.version] = judge
        return judge


def _unlearned(task: Task, error: Exception) -> CheckpointError:
    return CheckpointError(f"the task {task.name!r} cannot be learned: {first_line(error)}")


def _unscored(task: Task, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the labels of the task {task.name!r} cannot be scored: {first_line(error)}"
    )


def _run(work: Coroutine[Any, Any, object]) -> None:
    # On a thread of its own, for a caller may have an event loop running.
    thread = ThreadPoolExecutor(1)
    try:
        thread.submit(asyncio.run, work).result()
    finally:
        # Not waiting: whoever interrupts this closes the engine, which ends the work.
        thread.shutdown(wait=False)


def _key(prompts: TaskPrompts) -> object:
    """All that a judge depends on but the model: adapter, prompts, answers, and which is right."""
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
