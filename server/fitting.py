"""Gives every task its judge: the one kept from an earlier start, or one that is fitted now."""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from server.core.checkpoint import CheckpointError
from server.core.judge_cache import JudgeCache
from server.core.judges import (
    REFERENCE_TEXTS,
    Judge,
    Scorer,
    TaskPrompts,
    fit_judge,
)
from server.core.tasks import Task
from server.core.tokenizer import ChatTokenizer

logger = logging.getLogger(__name__)


def load_judges(
    tasks: Iterable[Task], scorer: Scorer, tokenizer: ChatTokenizer, cache: JudgeCache, *,
    num_layers: int, max_context: int,
) -> Mapping[str, Judge]:  # fmt: skip
    """The judges by the version of their task. Blocks until they are there.

    Raises:
        CheckpointError: the model gives no numbers to fit a judge to.
    """
    prompts = [TaskPrompts(task, tokenizer, max_context) for task in tasks]
    paths = {each.task.version: cache.path(_key(each)) for each in prompts}
    judges = {version: cache.read(path) for version, path in paths.items()}
    missing = [each for each in prompts if judges[each.task.version] is None]
    if missing:
        names = ", ".join(each.task.name for each in missing)
        logger.info("learning how to judge %s; with this model only once", names)
        # On a thread of its own, for a caller may have an event loop running.
        with ThreadPoolExecutor(1) as thread:
            fitted = thread.submit(asyncio.run, _fit_all(missing, scorer, num_layers)).result()
        for version, judge in fitted.items():
            cache.write(paths[version], judge)
            judges[version] = judge
    return {version: judge for version, judge in judges.items() if judge is not None}


async def _fit_all(
    all_prompts: list[TaskPrompts], scorer: Scorer, num_layers: int
) -> dict[str, Judge]:
    judges: dict[str, Judge] = {}
    total = sum(len(prompts.task.examples) for prompts in all_prompts)
    # disable=None: on a terminal only, so that no log is full of it.
    with tqdm(total=total, desc="learning tasks", leave=False, disable=None) as bar:
        for prompts in all_prompts:
            task = prompts.task
            try:
                judge = await fit_judge(scorer, prompts, num_layers, bar.update)
            except ValueError as error:
                raise CheckpointError(
                    f"the task {task.name!r} cannot be learned: {error}; the weights may be damaged"
                ) from error
            judges[task.version] = judge
    return judges


def _key(prompts: TaskPrompts) -> object:
    """All that a judge depends on but the model: prompts, answers, and which answer is right."""
    task = prompts.task
    texts = [example.text for example in task.examples] or list(REFERENCE_TEXTS)
    return [
        task.version,
        [prompts.encode(text) for text in texts],
        [[example.label, example.kind] for example in task.examples],
    ]
