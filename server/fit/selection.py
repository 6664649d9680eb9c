"""Selects rows: maps their labels, drops repetitions, limits their number, splits off a test part.

Knows tasks, not models.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from server.core.roles.prompts import normalise
from server.core.roles.tasks import MIN_EXAMPLES, Label, Task
from server.fit.errors import FitError
from server.fit.rows import BadRow, Row

# Seed of every random choice, which is therefore the same each time.
SEED = 0
MAX_LABELS = 255


@dataclass(frozen=True)
class LabelledText:
    """A normalised text and the index of its label. line: in the file."""

    line: int
    text: str
    label: int


@dataclass(frozen=True)
class Selection:
    """The training rows, the test rows, and the rows left out with reasons."""

    train: list[LabelledText]
    test: list[LabelledText]
    left_out: list[BadRow]


def task_of(
    tasks: Mapping[str, Task], name: str, instruction: str | None, labels: Sequence[str]
) -> Task:
    """The task of that name, or a new one with the instruction and the labels.

    Raises:
        FitError: the name is unknown and there is no instruction, or both exist; or the new task is
            invalid.
    """
    if name in tasks and instruction is None:
        return tasks[name]
    if name in tasks:
        raise FitError(
            f"the task {name!r} already has an instruction; leave out --instruction, or name a new "
            "task"
        )
    if instruction is None:
        raise FitError(
            f"there is no task {name!r}, only {', '.join(tasks)}; a new task needs --instruction"
        )
    distinct = tuple(dict.fromkeys(labels))
    if not 2 <= len(distinct) <= MAX_LABELS:
        raise FitError(f"the rows have {_counted(len(distinct), 'label')}; a task has 2 to 255")
    try:
        return Task(
            name=name,
            instructions=instruction,
            labels=tuple(Label(value=label, text=label) for label in distinct),
        )
    except ValidationError as error:
        raise FitError(f"the task {name!r} is invalid: {error.errors()[0]['msg']}") from error


def renamed(rows: Sequence[Row], names: Mapping[str, str]) -> tuple[list[Row], list[BadRow]]:
    """The rows with labels replaced as in `names`, and the rows whose label becomes empty."""
    new_rows = [Row(each.line, each.text, names.get(each.label, each.label)) for each in rows]
    reason = "has a label that --labels leaves out"
    return (
        [each for each in new_rows if each.label],
        [BadRow(each.line, reason) for each in new_rows if not each.label],
    )


def labelled(rows: Sequence[Row], task: Task) -> list[LabelledText]:
    """The rows with the indices of their labels. A row names a label by its value or its text.

    Raises:
        FitError: a label is not one of the task's.
    """
    indices = {
        name.casefold(): i
        for i, label in enumerate(task.labels)
        for name in (label.text, label.value)
    }
    for row in rows:
        if row.label.casefold() not in indices:
            raise FitError(
                f"line {row.line}: the task {task.name!r} has no label {row.label!r}, only "
                f"{', '.join(task.values)}; rename it with --labels {row.label}=LABEL, or leave "
                f"such rows out with --labels {row.label}="
            )
    return [
        LabelledText(row.line, normalise(row.text), indices[row.label.casefold()]) for row in rows
    ]


def select(
    texts: Sequence[LabelledText],
    task: Task,
    is_too_long: Callable[[str], bool],
    *,
    max_rows: int,
    test_share: float,
) -> Selection:
    """Splits the rows. The two parts share no text, and neither has one of the task's examples.

    Raises:
        FitError: a label has too few rows left.
    """
    distinct, left_out = _distinct(texts, task)
    if len(distinct) > max_rows:
        distinct = random.Random(SEED).sample(distinct, max_rows)
    kept = []
    for each in distinct:
        if is_too_long(each.text):
            left_out.append(BadRow(each.line, "is too long for the context"))
        else:
            kept.append(each)
    _check_counts(kept, task)
    train, test = divided(kept, test_share)
    return Selection(train, test, left_out)


def divided(
    rows: Sequence[LabelledText], share: float
) -> tuple[list[LabelledText], list[LabelledText]]:
    """Splits off a random share of each label's rows; returns the other rows, then the share."""
    shuffled = random.Random(SEED).sample(rows, len(rows))
    counts = Counter(each.label for each in rows)
    num_split_off: Counter[int] = Counter()
    kept: list[LabelledText] = []
    split_off: list[LabelledText] = []
    for each in shuffled:
        is_split_off = num_split_off[each.label] < round(share * counts[each.label])
        num_split_off[each.label] += is_split_off
        (split_off if is_split_off else kept).append(each)
    return kept, split_off


def _distinct(texts: Sequence[LabelledText], task: Task) -> tuple[list[LabelledText], list[BadRow]]:
    labels_of = defaultdict(set)
    for each in texts:
        labels_of[each.text].add(each.label)
    example_texts = {normalise(example.text) for example in task.examples}
    kept: dict[str, LabelledText] = {}
    left_out = []
    for each in texts:
        if each.text in example_texts:
            left_out.append(BadRow(each.line, "is one of the task's own examples"))
        elif len(labels_of[each.text]) > 1:
            left_out.append(BadRow(each.line, "has a text with two labels in the file"))
        elif each.text in kept:
            left_out.append(BadRow(each.line, "repeats a text"))
        else:
            kept[each.text] = each
    return list(kept.values()), left_out


def _check_counts(rows: Sequence[LabelledText], task: Task) -> None:
    counts = Counter(each.label for each in rows)
    if len(counts) < 2:
        labels = f"only one label, {task.values[min(counts)]!r}" if counts else "no label"
        raise FitError(
            f"the rows that can be used have {labels}; at least two labels are needed, each with "
            f"{MIN_EXAMPLES} rows"
        )
    for i, value in enumerate(task.values):
        if not counts[i] and not any(example.label == value for example in task.examples):
            raise FitError(
                f"the label {value!r} has neither rows nor examples of the task; "
                f"{MIN_EXAMPLES} rows are needed"
            )
        if 0 < counts[i] < MIN_EXAMPLES:
            raise FitError(
                f"the label {value!r} has {_counted(counts[i], 'row')} that can be used; "
                f"{MIN_EXAMPLES} are needed"
            )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
