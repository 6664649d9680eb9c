"""Fits a head to rows, judges the test part before and after, and says how it will go on.

Knows the engine's scores, not files.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from server.core.engine.engine import Scores
from server.core.roles.classification import decide
from server.core.roles.fitting import measure, states_of
from server.core.roles.heads import Indices
from server.core.roles.judges import CrossValidation, HeadJudge, Judge, LabelJudge, Scorer
from server.core.roles.measures import Doubles, Quality, chance_of, expected_accuracy, quality
from server.core.roles.prompts import TaskPrompts
from server.core.roles.refitting import Measured, Recipe, choose_recipe
from server.core.roles.tasks import Task
from server.fit.selection import SEED, Selection

# A gain that chance alone gives more often than this counts as none.
MAX_CHANCE = 0.05
CURVE_SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
# The points of the curve that are not all rows are means over so many draws.
CURVE_DRAWS = 5
# Of each label: one text has no covariance.
MIN_DRAWN = 2


@dataclass(frozen=True)
class Judgements:
    """What a judge says of N texts: indices of labels, and probabilities (N, K)."""

    labels: list[int]
    probabilities: Doubles


@dataclass(frozen=True)
class Comparison:
    """The present judge and the new one on the test part.

    num_better, num_worse: texts that the new one alone judges right, and wrong.
    """

    before: Quality
    after: Quality
    num_better: int
    num_worse: int

    @property
    def chance(self) -> float:
        """How often chance alone gives such a gain or a larger one."""
        return chance_of(self.num_better, self.num_worse)

    @property
    def is_gain(self) -> bool:
        """Whether the new judge is better by more than chance gives."""
        return self.chance <= MAX_CHANCE


@dataclass(frozen=True)
class Curve:
    """Accuracies on the test part of heads fitted to fewer rows, and the one to expect of more."""

    num_rows: tuple[int, ...]
    accuracies: tuple[float, ...]
    expected_of_twice: float


@dataclass(frozen=True)
class Fitted:
    """A judge of all rows; the figures are those of one that had not seen the test part."""

    judge: Judge
    comparison: Comparison
    recipe: str
    curve: Curve | None = None


@dataclass(frozen=True)
class Measurements:
    """What the model computed of the rows and the examples. test_scores: as a judge needs them."""

    layers: tuple[int, ...]
    test_scores: list[Scores]
    train: Measured
    test: Measured
    examples: Measured


async def measure_rows(
    scorer: Scorer, prompts: TaskPrompts, selection: Selection, present: Judge,
    layers: tuple[int, ...], report: Callable[[], object],
) -> Measurements:  # fmt: skip
    """Runs all rows and the task's examples through the analyst's prompt.

    present: the judge whose needs of the test part are met, too. layers: those that a head may be
    fitted to. Without any, the test part alone is run. report: called after each text.
    """
    all_layers = tuple(sorted({*layers, *present.layers}))
    examples, example_ids = prompts.examples if layers else ([], [])
    rows = [*selection.test, *(selection.train if layers else [])]
    all_ids = [prompts.encode(each.text) for each in rows] + example_ids
    num_test, num_rows = len(selection.test), len(rows)
    needs_labels = isinstance(present, LabelJudge)
    has_label_scores = [needs_labels and i < num_test for i in range(len(all_ids))]
    scores = await measure(scorer, prompts, all_ids, all_layers, has_label_scores, report)
    values = prompts.task.values
    labels = [each.label for each in rows] + [values.index(each.label) for each in examples]
    measured = Measured(states_of(scores, len(all_layers)), np.array(labels))
    return Measurements(
        all_layers,
        scores[:num_test],
        train=measured[np.arange(num_test, num_rows)],
        test=measured[np.arange(num_test)],
        examples=measured[np.arange(num_rows, len(all_ids))],
    )


def learn(task: Task, present: Judge, measured: Measurements) -> Fitted:
    """The head whose recipe cross-validation chose on the rows that are not of the test part."""
    train, test, examples = measured.train, measured.test, measured.examples
    recipe = choose_recipe(train, examples, len(task.labels))
    layer = measured.layers[recipe.layer_index]
    tested = HeadJudge(layer, recipe.fit(train, examples))
    all_rows = Measured(
        np.concatenate([train.states, test.states]), np.concatenate([train.labels, test.labels])
    )
    validation = CrossValidation(
        len(train), recipe.calibration.accuracy, recipe.calibration.log_loss
    )
    return Fitted(
        HeadJudge(layer, recipe.fit(all_rows, examples), validation),
        compare(
            judgements_of(task, present, measured),
            judgements_of(task, tested, measured),
            test.labels,
        ),
        _described(recipe, layer, len(examples)),
        _curve(recipe, train, test, examples),
    )


def judgements_of(task: Task, judge: Judge, measured: Measurements) -> Judgements:
    """What a judge says of the test part."""
    indices = [measured.layers.index(layer) for layer in judge.layers]
    all_scores = [
        replace(scores, hidden_states=states[indices])
        for scores, states in zip(measured.test_scores, measured.test.states, strict=True)
    ]
    return judgements(task, judge, all_scores)


def judgements(task: Task, judge: Judge, all_scores: Sequence[Scores]) -> Judgements:
    """What a judge says of texts, as the server would, with the task's fallback."""
    decided = [decide(task, judge, scores, 0) for scores in all_scores]
    return Judgements(
        [task.labels.index(each.label) for each in decided],
        np.array([[p for _, p in each.probabilities] for each in decided]),
    )


def compare(before: Judgements, after: Judgements, true: Indices) -> Comparison:
    """Two judgements of texts whose labels are known."""
    labels = true.tolist()
    was_right, is_right = np.array(before.labels) == true, np.array(after.labels) == true
    return Comparison(
        quality(before.labels, labels, before.probabilities),
        quality(after.labels, labels, after.probabilities),
        num_better=int((is_right & ~was_right).sum()),
        num_worse=int((was_right & ~is_right).sum()),
    )


def _described(recipe: Recipe, layer: int, num_examples: int) -> str:
    weight = f"{num_examples} examples of the task, each counted {recipe.example_weight:g} times"
    return (
        f"a linear head on the hidden state after layer {layer}, covariance shrunk by "
        f"{recipe.shrinkage:g}, fitted to the rows and "
        + (weight if recipe.example_weight else "none of the task's examples")
    )


def _curve(recipe: Recipe, train: Measured, test: Measured, examples: Measured) -> Curve:
    num_rows, accuracies = [], []
    for share in CURVE_SHARES:
        draws = list(_draws(train.labels, share))
        found = [_accuracy(recipe, train[chosen], test, examples) for chosen in draws]
        num_rows.append(len(draws[0]))
        accuracies.append(float(np.mean(found)))
    return Curve(
        tuple(num_rows), tuple(accuracies), expected_accuracy(num_rows, accuracies, 2 * len(train))
    )


def _draws(labels: Indices, share: float) -> Iterator[Indices]:
    """Indices of a share of each label's texts; several times, if it is not all."""
    random = np.random.default_rng(SEED)
    places = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for _ in range(1 if share == 1 else CURVE_DRAWS):
        yield np.concatenate(
            [
                random.permutation(each)[: max(MIN_DRAWN, round(share * len(each)))]
                for each in places
            ]
        )


def _accuracy(recipe: Recipe, rows: Measured, test: Measured, examples: Measured) -> float:
    scores = recipe.fit(rows, examples).scores(test.states[:, recipe.layer_index])
    return float((scores.argmax(1) == test.labels).mean())
