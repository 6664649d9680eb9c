"""Gives every task its judge: the one kept from an earlier start, or one that is fitted now."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from server.core.engine.checkpoint import CheckpointError
from server.core.roles.fitting import fit_judge
from server.core.roles.judge_cache import JudgeCache
from server.core.roles.judges import Judge, Scorer
from server.core.roles.prompts import TaskPrompts
from server.core.roles.tasks import Task
from server.core.text.tokenizer import ChatTokenizer
from server.reasons import first_line

logger = logging.getLogger(__name__)


def load_judges(
    tasks: Iterable[Task], scorer: Scorer, tokenizer: ChatTokenizer, cache: JudgeCache, *,
    num_layers: int, max_context: int,
) -> Mapping[str, Judge]:  # fmt: skip
    """The judges by the version of their task. Blocks until they are there.

    Raises:
        CheckpointError: the model computes nothing that a judge can be fitted to.
    """
    all_prompts = [TaskPrompts(task, tokenizer, max_context) for task in tasks]
    paths = {each.task.version: cache.path(_key(each)) for each in all_prompts}
    kept = {version: cache.read(path) for version, path in paths.items()}
    judges = {version: judge for version, judge in kept.items() if judge is not None}
    missing = [each for each in all_prompts if each.task.version not in judges]

    def keep(version: str, judge: Judge) -> None:
        cache.write(paths[version], judge)
        judges[version] = judge

    if missing:
        names = ", ".join(each.task.name for each in missing)
        logger.info("fitting judges for %s; they are kept for later starts", names)
        # On a thread of its own, for a caller may have an event loop running.
        thread = ThreadPoolExecutor(1)
        try:
            thread.submit(asyncio.run, _fit_all(missing, scorer, num_layers, keep)).result()
        finally:
            # Not waiting: whoever interrupts this closes the engine, which ends the work.
            thread.shutdown(wait=False)
    return judges


async def _fit_all(
    all_prompts: list[TaskPrompts], scorer: Scorer, num_layers: int,
    keep: Callable[[str, Judge], None],
) -> None:  # fmt: skip
    total = sum(len(prompts.examples[0]) for prompts in all_prompts)
    # disable=None: on a terminal only, so that no log is full of it.
    with tqdm(total=total, desc="learning tasks", leave=False, disable=None) as bar:
        for prompts in all_prompts:
            task = prompts.task
            try:
                judge = await fit_judge(scorer, prompts, num_layers, bar.update)
            except Exception as error:
                raise CheckpointError(
                    f"the task {task.name!r} cannot be learned: {first_line(error)}"
                ) from error
            keep(task.version, judge)


def _key(prompts: TaskPrompts) -> object:
    """All that a judge depends on but the model: prompts, answers, and which answer is right."""
    examples, all_ids = prompts.examples
    return [
        prompts.task.version,
        [
            [example.label, example.kind, ids]
            for example, ids in zip(examples, all_ids, strict=True)
        ],
        prompts.labels(0),
        None if examples else prompts.references,
    ]
