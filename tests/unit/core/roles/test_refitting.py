"""Heads fitted to a user's own rows, with examples that resemble them or do not."""

import numpy as np
import pytest

from server.core.roles.heads import Floats, Indices, fit_heads
from server.core.roles.refitting import EXAMPLE_WEIGHTS, Measured, choose_recipe

NUM_LABELS, SIZE = 3, 12


def drawn(
    num_texts: int, seed: int, shift: float = 0.0, informative_layer: int = 0, num_labels: int = 3
) -> Measured:
    """States of two layers, one of which predicts the labels; `shift` rotates its dimensions."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_texts) % num_labels
    states = rng.normal(size=(num_texts, 2, SIZE)).astype(np.float32)
    states[:, informative_layer, :NUM_LABELS] += 2 * np.eye(NUM_LABELS)[labels]
    states[:, informative_layer] = np.roll(states[:, informative_layer], round(shift), axis=1)
    return Measured(states, labels)


def none() -> Measured:
    return Measured(np.zeros((0, 2, SIZE), np.float32), np.zeros(0, np.intp))


def accuracy(rows: Measured, examples: Measured, test: Measured) -> float:
    recipe = choose_recipe(rows, examples, NUM_LABELS)
    scores = recipe.fit(rows, examples).scores(test.states[:, recipe.layer_index])
    return float((scores.argmax(1) == test.labels).mean())


@pytest.mark.parametrize("layer", [0, 1])
def test_the_layer_that_predicts_the_labels_is_chosen(layer: int) -> None:
    recipe = choose_recipe(drawn(60, 0, informative_layer=layer), none(), NUM_LABELS)
    assert recipe.layer_index == layer and recipe.example_weight == 0


def test_examples_that_are_like_the_rows_help() -> None:
    rows, examples, test = drawn(24, 1), drawn(600, 2), drawn(600, 3)
    recipe = choose_recipe(rows, examples, NUM_LABELS)
    assert recipe.example_weight > 0
    assert accuracy(rows, examples, test) > accuracy(rows, none(), test)


def test_contradicting_examples_are_left_out() -> None:
    rows, examples, test = drawn(120, 1), drawn(600, 2, shift=1), drawn(600, 3)
    recipe = choose_recipe(rows, examples, NUM_LABELS)
    assert recipe.example_weight == 0
    assert accuracy(rows, examples, test) == accuracy(rows, none(), test) > 0.75


def test_a_label_without_rows_is_learned_from_the_examples() -> None:
    rows, examples = drawn(60, 1, num_labels=2), drawn(300, 2)
    recipe = choose_recipe(rows, examples, NUM_LABELS)
    assert recipe.example_weight in EXAMPLE_WEIGHTS[1:]
    assert recipe.fit(rows, examples).weights.shape == (SIZE, NUM_LABELS)


def test_labels_with_a_gap_in_their_numbers_are_spread_evenly() -> None:
    rows = drawn(60, 1, num_labels=2)
    rows = Measured(rows.states, 2 * rows.labels)
    assert choose_recipe(rows, drawn(300, 2), NUM_LABELS).example_weight > 0


def test_probabilities_are_calibrated_on_held_out_rows() -> None:
    rows, test = drawn(90, 1), drawn(3000, 2)
    recipe = choose_recipe(rows, none(), NUM_LABELS)
    scores = recipe.fit(rows, none()).scores(test.states[:, recipe.layer_index])
    weights = np.exp(scores - scores.max(1, keepdims=True))
    confidence = float((weights / weights.sum(1, keepdims=True)).max(1).mean())
    right = float((scores.argmax(1) == test.labels).mean())
    assert confidence == pytest.approx(right, abs=0.08)


# --- weights --------------------------------------------------------------------------


def repeated(states: Floats, labels: Indices, times: int) -> tuple[Floats, Indices]:
    """The second half as often as said."""
    half = len(labels) // 2
    return (
        np.concatenate([states[:half], *[states[half:]] * times]),
        np.concatenate([labels[:half], *[labels[half:]] * times]),
    )


def test_a_weight_equals_repetition() -> None:
    rows = drawn(60, 4)
    states = rows.states[:, 0]
    weights = np.repeat(np.array([1, 3], np.float32), 30)
    [weighted] = fit_heads(states, rows.labels, [0.5], weights)
    [counted] = fit_heads(*repeated(states, rows.labels, 3), [0.5])
    a, b = (head.scores(states) for head in (weighted, counted))
    assert a - a[:, :1] == pytest.approx(b - b[:, :1], abs=1e-3)


def test_equal_weights_equal_none() -> None:
    rows = drawn(60, 4)
    states = rows.states[:, 0]
    [weighted] = fit_heads(states, rows.labels, [0.5], np.full(60, 0.1, np.float32))
    [plain] = fit_heads(states, rows.labels, [0.5])
    assert weighted.scores(states) == pytest.approx(plain.scores(states), abs=1e-4)
