"""Prompt branches as data: what the analyst is asked and which labels it may answer.

Reads TOML; knows neither tokens nor the model.
"""

import hashlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

BUILTIN_TASKS = Path(__file__).parent.parent / "tasks.toml"

NonEmpty = Annotated[str, StringConstraints(min_length=1)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class TaskFileError(Exception):
    """A task file cannot be used; the message is one sentence for the console."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Label(_Frozen):
    """One possible answer: `value` for clients, `text` for the model, `emoji` for people."""

    value: NonEmpty
    text: NonEmpty
    emoji: str = ""


class Task(_Frozen):
    """An instruction, the labels scored after it, and when to fall back."""

    name: NonEmpty
    instructions: NonEmpty
    labels: Annotated[tuple[Label, ...], Field(min_length=2, max_length=255)]
    fallback: str | None = None
    min_confidence: Probability = 0.0
    min_label_mass: Probability = 0.0
    cue: str | None = None

    @model_validator(mode="after")
    def _labels_are_consistent(self) -> "Task":
        for field in ("value", "text"):
            seen = [getattr(label, field) for label in self.labels]
            if len(set(seen)) != len(seen):
                raise ValueError(f"label {field}s must differ from each other")
        if self.fallback is not None and self.fallback not in {x.value for x in self.labels}:
            raise ValueError(f"fallback {self.fallback!r} is none of the labels")
        return self

    @property
    def version(self) -> str:
        """Changes whenever anything that can change a result changes."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def messages(self, text: str) -> list[dict[str, str]]:
        """The analyst's conversation about `text`: fixed instruction first, so it can be cached."""
        return [
            {"role": "system", "content": self.instructions},
            {"role": "user", "content": text},
        ]

    def render_cue(self, label: Label) -> str | None:
        """What the reply role is told about `label`, or None if this task has no cue."""
        if self.cue is None:
            return None
        return re.sub(r"\{(value|text|emoji)\}", lambda m: str(getattr(label, m[1])), self.cue)


def inline_task(instructions: str, labels: Sequence[str]) -> Task:
    """A task a client describes in its request: each label is its own text, no fallback.

    Raises:
        ValidationError: the labels repeat, or are too few or too many.
    """
    return Task(
        name="inline",
        instructions=instructions,
        labels=tuple(Label(value=label, text=label) for label in labels),
    )


def load_tasks(extra: Path | None = None) -> Mapping[str, Task]:
    """The built-in tasks by name, with those of the file `extra` added or replaced.

    Raises:
        TaskFileError: a file cannot be read, or a task in it is not valid.
    """
    tasks = _read(BUILTIN_TASKS)
    return tasks | _read(extra) if extra else tasks


def _read(path: Path) -> dict[str, Task]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise TaskFileError(f"cannot read the task file {path}: {error}") from error
    try:
        return TypeAdapter(dict[str, Task]).validate_python(
            {
                name: {**table, "name": name} if isinstance(table, dict) else table
                for name, table in tables.items()
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = "must be a table" if first["type"] == "model_type" else first["msg"]
        raise TaskFileError(f"task file {path}: {where}: {reason}") from error
