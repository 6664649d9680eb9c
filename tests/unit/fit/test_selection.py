"""The selection of rows; no text is in both the training and the test part."""

from collections import Counter
from collections.abc import Callable

import pytest

from server.core.roles.tasks import Example, Label, Task
from server.fit.errors import FitError
from server.fit.rows import Row
from server.fit.selection import (
    LabelledText,
    Selection,
    divided,
    labelled,
    renamed,
    select,
    task_of,
)

LABELS = (Label(value="good", text="好"), Label(value="bad", text="坏"))
EXAMPLES = tuple(
    Example(text=f"{label.value} example {i}", label=label.value)
    for label in LABELS
    for i in range(10)
)
TASK = Task(name="mood", instructions="Which?", labels=LABELS)
WITH_EXAMPLES = TASK.model_copy(update={"examples": EXAMPLES})


def texts(num_good: int = 20, num_bad: int = 20) -> list[LabelledText]:
    return [LabelledText(i + 2, f"good {i}", 0) for i in range(num_good)] + [
        LabelledText(i + 100, f"bad {i}", 1) for i in range(num_bad)
    ]


def chosen(
    of: list[LabelledText],
    task: Task = TASK,
    is_too_long: Callable[[str], bool] = lambda text: False,
    max_rows: int = 1000,
    test_share: float = 0.3,
) -> Selection:
    return select(of, task, is_too_long, max_rows=max_rows, test_share=test_share)


def reasons(selection: Selection) -> Counter[str]:
    return Counter(each.reason for each in selection.left_out)


# --- tasks and labels -----------------------------------------------------------------


def test_an_existing_task_is_found_by_its_name() -> None:
    assert task_of({"mood": TASK}, "mood", None, ["anything"]) is TASK


def test_a_new_task_has_the_labels_of_the_rows() -> None:
    task = task_of({"mood": TASK}, "kind", "Which kind?", ["b", "a", "b"])
    assert (task.name, task.instructions, task.values) == ("kind", "Which kind?", ["b", "a"])
    assert [label.text for label in task.labels] == ["b", "a"]


@pytest.mark.parametrize(
    ("name", "instruction", "labels", "says"),
    [
        ("kind", None, ["a", "b"], "no task 'kind', only mood; a new task needs --instruction"),
        ("mood", "Which?", ["a", "b"], "already has an instruction"),
        ("kind", "Which?", ["a", "a"], "have 1 label; a task has 2 to 255"),
        ("kind", "Which?", [], "have 0 labels"),
        ("kind", "Which?", [str(i) for i in range(256)], "have 256 labels"),
    ],
)
def test_an_invalid_task_is_one_sentence(
    name: str, instruction: str | None, labels: list[str], says: str
) -> None:
    with pytest.raises(FitError, match=says):
        task_of({"mood": TASK}, name, instruction, labels)


def test_labels_are_known_by_value_and_by_text_in_any_case() -> None:
    rows = [Row(2, " so\n so ", "Good"), Row(3, "b", "坏"), Row(4, "c", "bad")]
    found = labelled(rows, TASK)
    assert found == [
        LabelledText(2, "so so", 0),
        LabelledText(3, "b", 1),
        LabelledText(4, "c", 1),
    ]


def test_labels_are_renamed_or_left_out() -> None:
    rows = [Row(2, "a", "1"), Row(3, "b", "0"), Row(4, "c", "?"), Row(5, "d", "good")]
    kept, left_out = renamed(rows, {"1": "good", "0": "bad", "?": ""})
    assert [each.label for each in labelled(kept, TASK)] == [0, 1, 0]
    assert [each.line for each in left_out] == [4]


def test_a_label_that_the_task_lacks_is_one_sentence_with_the_remedy() -> None:
    with pytest.raises(FitError) as raised:
        labelled([Row(2, "a", "good"), Row(7, "b", "3 stars")], TASK)
    message = str(raised.value)
    assert "line 7" in message and "'3 stars'" in message and "good, bad" in message
    assert "--labels 3 stars=LABEL" in message and "\n" not in message


# --- rows -----------------------------------------------------------------------------


def test_no_text_is_in_both_parts() -> None:
    selection = chosen(texts())
    train, test = ({each.text for each in part} for part in (selection.train, selection.test))
    assert len(train) == 28 and len(test) == 12
    assert not train & test


def test_each_label_has_its_share_in_the_test_part_the_same_each_time() -> None:
    selection = chosen(texts(num_good=40, num_bad=10))
    assert Counter(each.label for each in selection.test) == {0: 12, 1: 3}
    assert selection == chosen(texts(num_good=40, num_bad=10))


def test_repeated_texts_are_used_once_and_reported() -> None:
    again = [LabelledText(500, "good 1", 0), LabelledText(501, "good 1", 0)]
    selection = chosen([*texts(), *again])
    assert [each.line for each in selection.left_out] == [500, 501]
    assert len(selection.train) + len(selection.test) == 40


def test_a_text_with_two_labels_is_not_used_at_all() -> None:
    selection = chosen([*texts(), LabelledText(500, "good 1", 1)])
    assert sorted(each.line for each in selection.left_out) == [3, 500]
    assert "good 1" not in {each.text for each in selection.train + selection.test}


def test_examples_of_the_task_are_in_neither_part() -> None:
    known = [LabelledText(500 + i, example.text, 0) for i, example in enumerate(EXAMPLES[:5])]
    selection = chosen([*texts(), *known], WITH_EXAMPLES)
    assert reasons(selection) == {"is one of the task's own examples": 5}
    assert not {each.text for each in known} & {
        each.text for each in selection.train + selection.test
    }


def test_texts_that_exceed_the_context_are_reported() -> None:
    selection = chosen(texts(), is_too_long=lambda text: text == "bad 3")
    assert [(each.line, each.reason) for each in selection.left_out] == [
        (103, "is too long for the context")
    ]


def test_max_rows_draws_a_random_sample_of_a_large_file() -> None:
    many = texts(num_good=60_000, num_bad=40_000)
    selection = chosen(many, max_rows=500)
    assert len(selection.train) + len(selection.test) == 500
    shares = Counter(each.label for each in selection.train + selection.test)
    assert 250 < shares[0] < 350
    assert selection == chosen(many, max_rows=500)


def test_a_label_without_rows_is_learned_from_the_examples() -> None:
    task = WITH_EXAMPLES.model_copy(
        update={
            "labels": (*LABELS, Label(value="so-so", text="中")),
            "examples": (*EXAMPLES, Example(text="neither", label="so-so")),
        }
    )
    assert len(chosen(texts(), task).train) == 28


@pytest.mark.parametrize(
    ("of", "says"),
    [
        (texts(num_bad=9), "the label 'bad' has 9 rows that can be used; 10 are needed"),
        (texts(num_bad=1), "the label 'bad' has 1 row that"),
        (texts(num_bad=0), "only one label, 'good'; at least two labels are needed"),
        ([], "have no label"),
    ],
)
def test_too_few_rows_say_how_many_are_needed(of: list[LabelledText], says: str) -> None:
    with pytest.raises(FitError, match=says):
        chosen(of)


def test_a_label_without_rows_and_examples_says_how_many_are_needed() -> None:
    task = TASK.model_copy(update={"labels": (*LABELS, Label(value="so-so", text="中"))})
    with pytest.raises(FitError, match="'so-so' has neither rows nor examples"):
        chosen(texts(), task)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_both_parts_have_every_label_at_any_share(share: float) -> None:
    for part in divided(texts(num_good=10, num_bad=10), share):
        assert {each.label for each in part} == {0, 1}
