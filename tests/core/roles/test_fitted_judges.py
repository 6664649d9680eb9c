"""A judge beside its task file is used only with the task and the model it was fitted to."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest

from server.core.roles.fitted_judges import read_fitted_judge, write_fitted_judge
from server.core.roles.heads import LinearHead
from server.core.roles.judges import CrossValidation, HeadJudge, LabelJudge
from server.core.roles.prompts import TaskPrompts
from server.core.roles.task_files import TaskFileError
from server.core.roles.tasks import Label, Task
from server.core.text.tokenizer import ChatTokenizer
from tests.test_judge_loading import OtherTokenizer
from tests.unit.core.roles.test_judges import FakeTokenizer

MODEL = "digest int8"
TASK = Task(
    name="mood",
    instructions="Which?",
    labels=tuple(Label(value=value, text=f"<{value}>") for value in ("up", "down")),
)
HEAD = LinearHead(np.ones(4, np.float32), np.eye(4, 2, dtype=np.float32), np.zeros(2, np.float32))
JUDGE = HeadJudge(3, HEAD, CrossValidation(70, 0.9, 0.3))


def prompts(task: Task = TASK, tokenizer: FakeTokenizer | None = None) -> TaskPrompts:
    return TaskPrompts(task, cast(ChatTokenizer, tokenizer or FakeTokenizer()), 1000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "mood.safetensors"
    write_fitted_judge(path, JUDGE, prompts(), MODEL)
    return path


def test_a_judge_is_read_as_it_was_written(path: Path) -> None:
    judge = read_fitted_judge(path, prompts(), MODEL)
    assert isinstance(judge, HeadJudge)
    assert (judge.layer, judge.validation) == (3, JUDGE.validation)
    assert np.array_equal(judge.head.weights, HEAD.weights)


def test_a_label_judge_is_read_as_it_was_written(tmp_path: Path) -> None:
    judge = LabelJudge(temperature=1.5)
    write_fitted_judge(tmp_path / "a.safetensors", judge, prompts(), MODEL)
    assert read_fitted_judge(tmp_path / "a.safetensors", prompts(), MODEL) == judge


def test_changes_without_effect_on_judgements_are_accepted(path: Path) -> None:
    labels = tuple(label.model_copy(update={"emoji": "🙂"}) for label in TASK.labels)
    other = TASK.model_copy(update={"labels": labels, "fallback": "up", "name": "other"})
    assert read_fitted_judge(path, prompts(other), MODEL)


@pytest.mark.parametrize(
    ("task", "tokenizer", "model", "says"),
    [
        (TASK, FakeTokenizer(), "other int8", "another model"),
        (TASK, FakeTokenizer(), "digest float32", "in int8, which is loaded in float32 here"),
        (
            TASK.model_copy(update={"instructions": "What?"}),
            FakeTokenizer(),
            MODEL,
            "another instruction than the task 'mood' has now",
        ),
        (
            TASK.model_copy(update={"labels": TASK.labels[::-1]}),
            FakeTokenizer(),
            MODEL,
            "other labels",
        ),
        (TASK, OtherTokenizer(), MODEL, "another chat template"),
    ],
)
def test_a_judge_of_another_task_or_model_is_one_sentence(
    path: Path, task: Task, tokenizer: FakeTokenizer, model: str, says: str
) -> None:
    with pytest.raises(TaskFileError) as raised:
        read_fitted_judge(path, prompts(task, tokenizer), model)
    message = str(raised.value)
    assert says in message and str(path) in message and "\n" not in message


@pytest.mark.parametrize("content", [b"", b"nonsense" * 40])
def test_a_damaged_judge_is_one_sentence(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(TaskFileError, match="is damaged"):
        read_fitted_judge(path, prompts(), MODEL)


def test_a_missing_judge_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TaskFileError, match=r"cannot read the judge .*none\.safetensors"):
        read_fitted_judge(tmp_path / "none.safetensors", prompts(), MODEL)
