"""Which rows are used: their labels, repetitions, how many, and which are kept aside for the test.

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

# Chooses the rows of the test part, and of more rows than are wanted; the same each time.
SEED = 0
MAX_LABELS = 255


@dataclass(frozen=True)
class LabelledText:
    """A text as it is judged, and the index of its label. line: in the file."""

    line: int
    text: str
    label: int


@dataclass(frozen=True)
class Selection:
    """The rows to fit to, those to test with, and what became of the others."""

    train: list[LabelledText]
    test: list[LabelledText]
    left_out: list[BadRow]


def task_of(
    tasks: Mapping[str, Task], name: str, instruction: str | None, labels: Sequence[str]
) -> Task:
    """The task of that name, or a new one of the instruction with the labels.

    Raises:
        FitError: there is no such task and no instruction for one, or there are both.
    """
    if name in tasks and instruction is None:
        return tasks[name]
    if name in tasks:
        raise FitError(f"the task {name!r} has an instruction; name a new task for another one")
    if instruction is None:
        raise FitError(
            f"there is no task {name!r}, only {', '.join(tasks)}; a new one needs --instruction"
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
        raise FitError(f"the task {name!r} cannot be: {error.errors()[0]['msg']}") from error


def renamed(rows: Sequence[Row], names: Mapping[str, str]) -> tuple[list[Row], list[BadRow]]:
    """The rows with the labels that `names` gives theirs, and those whose label it empties."""
    kept = [Row(each.line, each.text, names.get(each.label, each.label)) for each in rows]
    without = "has a label that --labels leaves out"
    return (
        [each for each in kept if each.label],
        [BadRow(each.line, without) for each in kept if not each.label],
    )


def labelled(rows: Sequence[Row], task: Task) -> list[LabelledText]:
    """The rows with the indices of their labels, which they have by value or text.

    Raises:
        FitError: a label is none of the task's.
    """
    indices = {
        name.casefold(): i
        for i, label in enumerate(task.labels)
        for name in (label.text, label.value)
    }
    for row in rows:
        if row.label.casefold() not in indices:
            known = ", ".join(task.values)
            raise FitError(
                f"line {row.line}: the label {row.label!r} is none of the task {task.name!r}: "
                f"{known}; say which is meant with --labels {row.label}=LABEL, or leave such rows "
                f"out with --labels {row.label}="
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
    """Divides the rows; no text is in both parts, nor one of the task's own examples in either.

    Raises:
        FitError: too few rows of a label are left.
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
    """The rows but a share of each label's, and that share, in random order."""
    shuffled = random.Random(SEED).sample(rows, len(rows))
    counts = Counter(each.label for each in rows)
    num_aside: Counter[int] = Counter()
    kept: list[LabelledText] = []
    aside: list[LabelledText] = []
    for each in shuffled:
        is_aside = num_aside[each.label] < round(share * counts[each.label])
        num_aside[each.label] += is_aside
        (aside if is_aside else kept).append(each)
    return kept, aside


def _distinct(texts: Sequence[LabelledText], task: Task) -> tuple[list[LabelledText], list[BadRow]]:
    labels_of = defaultdict(set)
    for each in texts:
        labels_of[each.text].add(each.label)
    known = {normalise(example.text) for example in task.examples}
    kept: dict[str, LabelledText] = {}
    left_out = []
    for each in texts:
        if each.text in known:
            left_out.append(BadRow(each.line, "is one of the task's own examples"))
        elif len(labels_of[each.text]) > 1:
            left_out.append(BadRow(each.line, "has a text that stands with two labels"))
        elif each.text in kept:
            left_out.append(BadRow(each.line, "has a text that came before"))
        else:
            kept[each.text] = each
    return list(kept.values()), left_out


def _check_counts(rows: Sequence[LabelledText], task: Task) -> None:
    counts = Counter(each.label for each in rows)
    if len(counts) < 2:
        has = f"one label only, {task.values[min(counts)]!r}" if counts else "no label"
        raise FitError(
            f"the rows that can be used have {has}; two labels are needed at least, each with "
            f"{MIN_EXAMPLES} rows"
        )
    for i, value in enumerate(task.values):
        if not counts[i] and not any(example.label == value for example in task.examples):
            raise FitError(
                f"the label {value!r} has no rows, nor has the task examples of it; "
                f"{MIN_EXAMPLES} rows are needed"
            )
        if 0 < counts[i] < MIN_EXAMPLES:
            raise FitError(
                f"the label {value!r} has {_counted(counts[i], 'row')} that can be used; "
                f"{MIN_EXAMPLES} are needed"
            )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
