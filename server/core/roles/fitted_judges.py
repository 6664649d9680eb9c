"""Reads and writes the judges of `fit`, which are files beside their task file.

A judge is accepted only for the task and the model it was fitted to. Knows files and prompts, not
the texts that a judge was fitted to.
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

# The text of the prompt whose digest identifies the chat template.
_TEXT = "a"


def write_fitted_judge(path: Path, judge: Judge, prompts: TaskPrompts, model: str) -> None:
    """Writes the judge. model: digest of the weights, a space, and their type.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    write_judge(path, judge, _identity(prompts, model))


def read_fitted_judge(path: Path, prompts: TaskPrompts, model: str) -> Judge:
    """Reads the judge. model: as in `write_fitted_judge`.

    Raises:
        TaskFileError: the file cannot be read, or belongs to another task or model.
    """
    try:
        judge, about = read_judge(path)
    except OSError as error:
        raise TaskFileError(f"cannot read the judge {path}: {first_line(error)}") from error
    except DamagedJudgeError as error:
        raise TaskFileError(f"the judge {path} is damaged; copy it again, or fit again") from error
    if reason := _mismatch(about, _identity(prompts, model)):
        raise TaskFileError(f"the judge {path} was fitted to {reason}")
    return judge


def _identity(prompts: TaskPrompts, model: str) -> dict[str, Any]:
    """What the judge belongs to: task, model and chat template."""
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
    """The first difference between the two, with its remedy; None if there is none."""
    task = expected["task"]
    remedies = {
        "weights": "another model; serve that one, or fit the task to this one",
        "dtype": f"the model in {written.get('dtype')}, which is loaded in {expected['dtype']} "
        f"here; give --dtype {written.get('dtype')}, or fit again",
        "instructions": f"another instruction than the task {task!r} has now; fit again",
        "labels": f"other labels than the task {task!r} has now; fit again",
        "prompt": "another chat template than the model has now; fit again",
    }
    return next((text for key, text in remedies.items() if written.get(key) != expected[key]), None)
