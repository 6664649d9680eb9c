"""Fits a head to rows, compares it with the present judge, and computes a learning curve.

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

# The largest p-value that counts as a gain.
MAX_CHANCE = 0.05
CURVE_SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
# A point of the curve that does not use all rows is the mean over this many draws.
CURVE_DRAWS = 5
# Rows of each label in a draw: one text has no covariance.
MIN_DRAWN = 2


@dataclass(frozen=True)
class Judgements:
    """A judge's labels of N texts, as indices, and probabilities: (N, K)."""

    labels: list[int]
    probabilities: Doubles


@dataclass(frozen=True)
class Comparison:
    """The present judge and the new one on the test part.

    num_better, num_worse: texts that only the new judge labels correctly, and only the present one.
    """

    before: Quality
    after: Quality
    num_better: int
    num_worse: int

    @property
    def chance(self) -> float:
        """The p-value: how often chance alone gives this gain or a larger one."""
        return chance_of(self.num_better, self.num_worse)

    @property
    def is_gain(self) -> bool:
        """Whether the new judge is significantly better."""
        return self.chance <= MAX_CHANCE


@dataclass(frozen=True)
class Curve:
    """Test accuracy of heads fitted to fewer rows, and the accuracy to expect of twice the rows."""

    num_rows: tuple[int, ...]
    accuracies: tuple[float, ...]
    expected_of_twice: float


@dataclass(frozen=True)
class Fitted:
    """A judge fitted to all rows; its figures are those of a judge not fitted to the test part."""

    judge: Judge
    comparison: Comparison
    recipe: str
    curve: Curve | None = None


@dataclass(frozen=True)
class Measurements:
    """The model's results for the rows and the examples. test_scores: as judges need them."""

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

    present: a judge that will label the test part. layers: the layers that a head may be fitted to;
    if empty, only the test part is run. report: called after each text.
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
    """The best head. Cross-validation on the rows outside the test part chooses its recipe."""
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
    """A judge's labels of the test part."""
    indices = [measured.layers.index(layer) for layer in judge.layers]
    all_scores = [
        replace(scores, hidden_states=states[indices])
        for scores, states in zip(measured.test_scores, measured.test.states, strict=True)
    ]
    return judgements(task, judge, all_scores)


def judgements(task: Task, judge: Judge, all_scores: Sequence[Scores]) -> Judgements:
    """A judge's labels of texts, with the task's fallback, as in the server."""
    decided = [decide(task, judge, scores, 0) for scores in all_scores]
    return Judgements(
        [task.labels.index(each.label) for each in decided],
        np.array([[p for _, p in each.probabilities] for each in decided]),
    )


def compare(before: Judgements, after: Judgements, true: Indices) -> Comparison:
    """Compares two judges' labels with the true labels."""
    labels = true.tolist()
    was_correct, is_correct = np.array(before.labels) == true, np.array(after.labels) == true
    return Comparison(
        quality(before.labels, labels, before.probabilities),
        quality(after.labels, labels, after.probabilities),
        num_better=int((is_correct & ~was_correct).sum()),
        num_worse=int((was_correct & ~is_correct).sum()),
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
        per_draw = [_accuracy(recipe, train[indices], test, examples) for indices in draws]
        num_rows.append(len(draws[0]))
        accuracies.append(float(np.mean(per_draw)))
    return Curve(
        tuple(num_rows), tuple(accuracies), expected_accuracy(num_rows, accuracies, 2 * len(train))
    )


def _draws(labels: Indices, share: float) -> Iterator[Indices]:
    """Random indices of a share of each label's texts, CURVE_DRAWS times; once if it is all."""
    random = np.random.default_rng(SEED)
    indices_by_label = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for _ in range(1 if share == 1 else CURVE_DRAWS):
        yield np.concatenate(
            [
                random.permutation(each)[: max(MIN_DRAWN, round(share * len(each)))]
                for each in indices_by_label
            ]
        )


def _accuracy(recipe: Recipe, rows: Measured, test: Measured, examples: Measured) -> float:
    scores = recipe.fit(rows, examples).scores(test.states[:, recipe.layer_index])
    return float((scores.argmax(1) == test.labels).mean())
