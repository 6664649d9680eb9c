"""Judges beside their task file: written by `fit`, used with the model and task they belong to.

Knows files and prompts, not what a judge was fitted to.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from server.core.roles.judge_files import DamagedJudgeError, read_judge, write_judge
from server.core.roles.judges import Judge
from server.core.roles.prompts import TaskPrompts
from server.core.roles.task_files import TaskFileError
from server.reasons import first_line

# Stands in the chat template where a text would.
_TEXT = "a"


def write_fitted_judge(path: Path, judge: Judge, prompts: TaskPrompts, model: str) -> None:
    """model: the digest of the weights and their type, with a space between.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    write_judge(path, judge, _about(prompts, model))


def read_fitted_judge(path: Path, prompts: TaskPrompts, model: str) -> Judge:
    """The judge, if it belongs to the task and to the model. model: as for writing.

    Raises:
        TaskFileError: it does not, or the file cannot be read.
    """
    try:
        judge, about = read_judge(path)
    except OSError as error:
        raise TaskFileError(f"cannot read the judge {path}: {first_line(error)}") from error
    except DamagedJudgeError as error:
        raise TaskFileError(f"the judge {path} is damaged; copy it again, or fit again") from error
    if reason := _mismatch(about, _about(prompts, model)):
        raise TaskFileError(f"the judge {path} was fitted to {reason}")
    return judge


def _about(prompts: TaskPrompts, model: str) -> dict[str, Any]:
    weights, _, dtype = model.partition(" ")
    task = prompts.task
    return {
        "task": task.name,
        "instructions": task.instructions,
        "labels": [[label.value, label.text] for label in task.labels],
        "weights": weights,
        "dtype": dtype,
        "prompt": hashlib.sha256(json.dumps(prompts.encode(_TEXT)).encode()).hexdigest(),
    }


def _mismatch(written: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """What the judge was fitted to that is not so here, and what to do; None if all is so."""
    task = expected["task"]
    remedies = {
        "weights": "another model; serve that one, or fit the task to this one",
        "dtype": f"the model in {written.get('dtype')}, which is loaded in {expected['dtype']} "
        f"here; give --dtype {written.get('dtype')}, or fit again",
        "instructions": f"another instruction than the task {task!r} has now; fit again",
        "labels": f"other labels than the task {task!r} has now; fit again",
        "prompt": "another chat template than the model has now; fit again",
    }
    return next((why for key, why in remedies.items() if written.get(key) != expected[key]), None)
