"""Fits a head to rows and tests it on others, with a fake model that knows the true labels."""

import numpy as np
import pytest

from server.core.roles.judges import HeadJudge, LabelJudge
from server.core.roles.prompts import TaskPrompts
from server.fit.learning import (
    Comparison,
    Fitted,
    Judgements,
    Measurements,
    compare,
    learn,
    measure_rows,
)
from server.fit.selection import LabelledText, Selection, divided
from tests.unit.core.roles.test_judges import (
    LAYERS,
    VALUES,
    FakeModel,
    bounded,
    examples,
    hinting,
    prompts_of,
    silent,
    task,
    telling,
    truth,
)

NUM_ROWS = 90


def rows(num: int = NUM_ROWS) -> list[LabelledText]:
    texts = [f"{VALUES[i % 3]} {1000 + i}" for i in range(num)]
    return [LabelledText(i + 2, text, truth(text)) for i, text in enumerate(texts)]


def selection() -> Selection:
    train, test = divided(rows(), 0.3)
    return Selection(train, test, [])


async def measured(
    model: FakeModel, prompts: TaskPrompts, present: LabelJudge | HeadJudge,
    layers: tuple[int, ...] = LAYERS,
) -> Measurements:  # fmt: skip
    return await bounded(measure_rows(model, prompts, selection(), present, layers, lambda: None))


async def learned(model: FakeModel, with_examples: bool = True) -> Fitted:
    prompts = prompts_of(task() if with_examples else task([]))
    return learn(prompts.task, LabelJudge(), await measured(model, prompts, LabelJudge()))


@pytest.mark.parametrize("with_examples", [True, False])
async def test_a_head_on_informative_states_is_a_gain(with_examples: bool) -> None:
    fitted = await learned(FakeModel(states=telling), with_examples)
    assert isinstance(fitted.judge, HeadJudge) and fitted.judge.layer in LAYERS
    comparison = fitted.comparison
    assert comparison.after.accuracy > 0.95 > 0.6 > comparison.before.accuracy
    assert comparison.is_gain
    assert fitted.judge.validation is not None and fitted.judge.validation.num_examples == 63
    assert ("90 examples" in fitted.recipe) or ("none of the task's examples" in fitted.recipe)


async def test_a_head_on_uninformative_states_is_no_gain() -> None:
    fitted = await learned(FakeModel(label_scores=lambda text: telling(text, 0)[:3]))
    assert not fitted.comparison.is_gain
    assert fitted.comparison.before.accuracy > 0.95


async def test_the_test_part_affects_neither_the_recipe_nor_the_tested_head() -> None:
    # The states of the test part point to wrong labels.
    contrary = {each.text for each in selection().test}

    def states(text: str, layer: int) -> np.ndarray:
        return np.roll(telling(text, layer), 1) if text in contrary else telling(text, layer)

    fitted = await learned(FakeModel(states=states))
    assert fitted.comparison.after.accuracy < 0.1
    assert fitted.judge.validation is not None and fitted.judge.validation.accuracy > 0.95


async def test_the_written_head_is_fitted_to_the_test_part_too() -> None:
    fitted = await learned(FakeModel(states=hinting), with_examples=False)
    measured_ = await measured(FakeModel(states=hinting), prompts_of(task([])), LabelJudge())
    assert isinstance(fitted.judge, HeadJudge)
    both = np.concatenate([measured_.train.states, measured_.test.states])
    index = measured_.layers.index(fitted.judge.layer)
    assert fitted.judge.head.center == pytest.approx(both[:, index].mean(0), abs=1e-5)


async def test_a_learning_curve_rises_to_all_rows() -> None:
    curve = (await learned(FakeModel(states=hinting), with_examples=False)).curve
    assert curve is not None
    assert curve.num_rows == (9, 15, 30, 63)
    assert curve.accuracies[-1] > curve.accuracies[0]
    assert curve.accuracies[-1] - 0.1 < curve.expected_of_twice < 1


async def test_label_texts_are_scored_for_the_test_part_only() -> None:
    model = FakeModel(states=telling)
    await measured(model, prompts_of(), LabelJudge())
    scored = [call["text"] for call in model.calls if call["labels"]]
    assert scored == [each.text for each in selection().test]
    assert len(model.calls) == NUM_ROWS + len(examples())


async def test_without_layers_only_the_test_part_is_run() -> None:
    model = FakeModel()
    found = await measured(model, prompts_of(), LabelJudge(), layers=())
    assert len(model.calls) == len(found.test) == 27
    assert len(found.train) == len(found.examples) == 0


async def test_the_layer_of_the_present_head_is_measured_too() -> None:
    model = FakeModel(states=silent)
    head = (await learned(FakeModel(states=telling))).judge
    assert isinstance(head, HeadJudge)
    present = HeadJudge(3, head.head)
    found = await measured(model, prompts_of(), present)
    assert found.layers == (3, *LAYERS)
    assert not [call for call in model.calls if call["labels"]]


def test_judgements_are_compared_text_by_text() -> None:
    sure = np.eye(2)
    before = Judgements([0, 0, 1, 1], sure[[0, 0, 1, 1]])
    after = Judgements([0, 1, 1, 0], sure[[0, 1, 1, 0]])
    found = compare(before, after, np.array([0, 1, 0, 1]))
    assert (found.num_better, found.num_worse) == (1, 1)
    assert not found.is_gain and found.chance == 0.75


@pytest.mark.parametrize(("better", "is_gain"), [(4, False), (5, True)])
def test_five_of_five_are_a_gain_and_four_of_four_are_none(better: int, is_gain: bool) -> None:
    same = Judgements([0], np.eye(2)[[0]])
    nothing = compare(same, same, np.array([0]))
    assert Comparison(nothing.before, nothing.after, better, 0).is_gain == is_gain
