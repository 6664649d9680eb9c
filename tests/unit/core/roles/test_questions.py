"""Questions as tasks: what the model is asked, which answers it may give, and their mean."""

import pytest

from server.core.roles.classification import Classification
from server.core.roles.questions import NO, YES, choice, expected_level, predicate, score
from server.core.roles.tasks import Label, Task


def answers_of(task: Task) -> list[str]:
    return [label.text for label in task.labels]


def test_a_predicate_is_answered_yes_or_no() -> None:
    task = predicate("The customer is angry.")
    assert answers_of(task) == [YES, NO]
    assert task.instructions.startswith("The customer is angry.\n")


def test_options_are_listed_with_their_descriptions() -> None:
    task = choice("Which team?", [("billing", None), ("technical", "crashes and outages")])
    assert answers_of(task) == ["billing", "technical"]
    assert task.instructions.startswith("Which team?\n")
    assert task.instructions.endswith("\n- billing\n- technical: crashes and outages")


def test_levels_are_listed_from_the_lowest() -> None:
    task = score("How urgent?", [("low", None), ("high", "today")])
    assert answers_of(task) == ["low", "high"]
    assert "from lowest to highest:\n- low\n- high: today" in task.instructions


def test_no_question_falls_back_to_an_answer_the_model_did_not_give() -> None:
    for task in (predicate("a"), choice("a", [("b", None), ("c", None)])):
        assert (task.fallback, task.min_confidence, task.min_label_mass) == (None, 0, 0)


@pytest.mark.parametrize(
    ("probabilities", "level"),
    [((1.0, 0.0), 0.0), ((0.0, 1.0), 1.0), ((0.25, 0.5, 0.25), 1.0), ((0.1, 0.2, 0.7), 1.6)],
)
def test_the_expected_level_weighs_each_level_with_its_probability(
    probabilities: tuple[float, ...], level: float
) -> None:
    labels = [Label(value=str(i), text=str(i)) for i in range(len(probabilities))]
    answer = Classification(
        label=labels[0],
        confidence=probabilities[0],
        probabilities=tuple(zip(labels, probabilities, strict=True)),
        num_prompt_tokens=1,
        num_cached_tokens=0,
    )
    assert expected_level(answer) == pytest.approx(level)
