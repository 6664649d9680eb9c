"""Writes a fitted task as a folder for `--tasks`."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from server.core.roles.fitted_judges import write_fitted_judge
from server.core.roles.prompts import TaskPrompts
from server.core.roles.task_files import TASK_FILE_NAME
from server.core.roles.tasks import Task
from server.fit.errors import FitError
from server.fit.report import Report
from server.fit.tuning import SoftPrompt


def write_fitted(
    folder: Path, prompts: TaskPrompts, model: str, report: Report, soft_prompt: SoftPrompt | None
) -> None:
    """Writes the task file, the judge and the report. Keeps other tasks of the folder.

    model: as for `write_fitted_judge`. soft_prompt: the judge's soft prompt, if it has one.

    Raises:
        OSError, SafetensorError: a file cannot be written.
    """
    task = prompts.task
    stem = file_stem(task.name)
    table = _table(task) | {"judge": f"{stem}.safetensors"}
    if soft_prompt is not None:
        soft_prompt.save(adapter_folder(folder, task.name))
        table["adapter"] = stem
    write_fitted_judge(folder / f"{stem}.safetensors", report.fitted.judge, prompts, model)
    figures = json.dumps(report.as_json(), ensure_ascii=False, indent=1)
    (folder / f"{stem}-report.json").write_text(f"{figures}\n", encoding="utf-8")
    (folder / f"{stem}-report.html").write_text(report.as_page(), encoding="utf-8")
    # Last, because it names the other files.
    tables = other_tables(folder) | {task.name: table}
    (folder / TASK_FILE_NAME).write_text(
        tomli_w.dumps(tables, multiline_strings=True), encoding="utf-8"
    )


def adapter_folder(folder: Path, task_name: str) -> Path:
    """The folder of a task's soft prompt, in peft's format."""
    return folder / f"{file_stem(task_name)}-adapter"


def file_stem(task_name: str) -> str:
    """How the names of a task's files begin."""
    return re.sub(r"[^\w-]", "_", task_name)


def other_tables(folder: Path) -> dict[str, Any]:
    """The tables of the folder's task file; empty if it has none.

    Raises:
        FitError: the task file cannot be read, or `folder` is a file.
    """
    path = folder / TASK_FILE_NAME
    if folder.exists() and not folder.is_dir():
        raise FitError(f"--out {folder} is a file; name a folder")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FitError(
            f"--out {folder}: cannot read its {TASK_FILE_NAME} ({error}); correct that file, or "
            "name another folder"
        ) from error


def _table(task: Task) -> dict[str, Any]:
    """The task as a table of a task file, without its examples: the judge was fitted to them."""
    return task.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
