"""Reads task files: TOML, and the examples beside them as JSON Lines."""

import json
import os
import tomllib
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from server.core.roles.tasks import Example, ExtractTask, ReplyStyle, Task

BUILTIN_FOLDER = Path(__file__).parents[2] / "tasks"
TASK_FILE_NAME = "tasks.toml"
# The table of a task file that is not a task.
REPLY = "reply"
# The values of a task's `kind`.
LABELS, EXTRACT = "labels", "extract"

T = TypeVar("T")


class TaskFileError(Exception):
    """A task file cannot be used; the message is one sentence for the console."""


@dataclass(frozen=True)
class TaskFile:
    """The contents of one or more task files: tasks by name, and the reply's style.

    No name is in both `tasks` and `extract_tasks`.
    """

    tasks: Mapping[str, Task] = field(default_factory=dict)
    extract_tasks: Mapping[str, ExtractTask] = field(default_factory=dict)
    reply: ReplyStyle = field(default_factory=ReplyStyle)

    def __or__(self, other: "TaskFile") -> "TaskFile":
        """Both files' contents; where names are equal, the other file's."""
        return TaskFile(
            {**_without(self.tasks, other.extract_tasks), **other.tasks},
            {**_without(self.extract_tasks, other.tasks), **other.extract_tasks},
            self.reply | other.reply,
        )


def read_task_file(path: Path = BUILTIN_FOLDER / TASK_FILE_NAME) -> TaskFile:
    """Reads a task file; without a path, the built-in one.

    path: the file, or a folder with a `tasks.toml`.
    A task's examples are read from the file it names, which lies beside the task file or is
    built in. A judge file that it names lies beside the task file, and is not read yet.

    Raises:
        TaskFileError: a file cannot be read, or a task in it is not valid.
    """
    if path.is_dir():
        path /= TASK_FILE_NAME
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise TaskFileError(f"cannot read the task file {path}: {error}") from error
    styles = {REPLY: tables.pop(REPLY)} if REPLY in tables else {}
    by_kind: dict[str, dict[str, Any]] = {LABELS: {}, EXTRACT: {}}
    for name, table in tables.items():
        kind = _kind_of(path, name, table)
        by_kind[kind][name] = _completed(path, name, kind, table)
    try:
        return TaskFile(
            TypeAdapter(dict[str, Task]).validate_python(by_kind[LABELS]),
            TypeAdapter(dict[str, ExtractTask]).validate_python(by_kind[EXTRACT]),
            TypeAdapter(dict[str, ReplyStyle]).validate_python(styles).get(REPLY, ReplyStyle()),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "model_type":
            reason = "must be a table"
        raise TaskFileError(f"task file {path}: {where}: {reason}") from error


def _kind_of(path: Path, name: str, table: Any) -> str:
    kind = table.get("kind", LABELS) if isinstance(table, dict) else LABELS
    if kind not in (LABELS, EXTRACT):
        raise TaskFileError(f"task file {path}: {name}.kind: must be {LABELS!r} or {EXTRACT!r}")
    return str(kind)


def _completed(path: Path, name: str, kind: str, table: Any) -> Any:
    """The table with all fields of a task. Anything else is returned for validation to refuse."""
    if not isinstance(table, dict):
        return table
    given = {key: value for key, value in table.items() if key != "kind"}
    return {**(_with_files(path, given) if kind == LABELS else given), "name": name}


def _without(tasks: Mapping[str, T], names: Container[str]) -> dict[str, T]:
    return {name: task for name, task in tasks.items() if name not in names}


def _with_files(path: Path, table: dict[str, Any]) -> dict[str, Any]:
    """The table with the examples read, and with the path of the judge."""
    fields: dict[str, Any] = {}
    if isinstance(name := table.get("examples"), str):
        fields["examples"] = _examples_of(path, name)
    if isinstance(name := table.get("judge"), str):
        fields["judge"] = _beside(path, "judge", name)
    return {**table, **fields}


def _examples_of(path: Path, name: str) -> list[Example]:
    file, builtin = _beside(path, "examples", name), BUILTIN_FOLDER / name
    if os.path.isfile(builtin) and not os.path.isfile(file):
        file = builtin
    try:
        examples = _read_examples(file)
    except (OSError, UnicodeDecodeError) as error:
        raise TaskFileError(
            f"task file {path}: cannot read the examples {file}: {error}"
        ) from error
    if not examples:
        raise TaskFileError(f"task file {path}: there are no examples in {name!r}")
    return examples


def _beside(path: Path, key: str, name: str) -> Path:
    if Path(name).name != name:
        raise TaskFileError(
            f"task file {path}: {key} {name!r} must be the name of a file beside it"
        )
    return path.parent / name


def _read_examples(path: Path) -> list[Example]:
    examples = []
    # Not splitlines: JSON strings may contain other line separators.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            examples.append(Example.model_validate(json.loads(line)))
        except (ValidationError, ValueError, RecursionError) as error:
            raise TaskFileError(
                f"examples {path}, line {number}: must be an object with a 'text' and a 'label'"
            ) from error
    return examples
