"""Linear heads compared with slow formulas; folds of examples; calibration."""

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from server.core.roles.heads import (
    NUM_FOLDS,
    SHRINKAGES,
    TEMPERATURES,
    Floats,
    Indices,
    LinearHead,
    calibrate,
    cross_validated,
    fit_heads,
    folds_of,
    log_loss,
)

# Of probabilities computed in float32.
TOLERANCE = 5e-4
Doubles = NDArray[np.float64]


def gaussian(
    num_examples: int = 300,
    size: int = 8,
    num_labels: int = 3,
    distance: float = 1.0,
    seed: int = 0,
) -> tuple[Floats, Indices]:
    """States with one covariance, which is no multiple of the identity, around a mean a label."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num_examples) % num_labels)
    mixing = np.diag(np.linspace(0.3, 1.5, size)) + rng.normal(size=(size, size)) / size
    means = rng.normal(size=(num_labels, size)) * distance
    states = means[labels] + rng.normal(size=(num_examples, size)) @ mixing
    return states.astype(np.float32), labels


def softmax(scores: Floats | Doubles) -> Doubles:
    exact = scores.astype(np.float64)
    weights = np.exp(exact - exact.max(-1, keepdims=True))
    result: Doubles = weights / weights.sum(-1, keepdims=True)
    return result


def posterior(states: Floats, labels: Indices, shrinkage: float, texts: Floats) -> Doubles:
    """Probabilities of the labels by Bayes' rule from the densities of gaussians, term by term."""
    exact, num_labels = states.astype(np.float64), int(labels.max()) + 1
    means = [sum(exact[labels == k]) / sum(labels == k) for k in range(num_labels)]
    size = exact.shape[1]
    covariance = np.zeros((size, size))
    for x, k in zip(exact, labels, strict=True):
        covariance += np.outer(x - means[k], x - means[k]) / len(exact)
    spherical = np.eye(size) * np.trace(covariance) / size
    inverse = np.linalg.inv((1 - shrinkage) * covariance + shrinkage * spherical)
    distances = [[(x - m) @ inverse @ (x - m) for m in means] for x in texts.astype(np.float64)]
    return softmax(-0.5 * np.array(distances))


# --- the fit --------------------------------------------------------------------------


@pytest.mark.parametrize("num_labels", [2, 3, 7])
@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.5, 0.9, 0.98, 1.0])
def test_a_head_gives_the_posterior_of_gaussians_with_the_shrunk_covariance(
    shrinkage: float, num_labels: int
) -> None:
    states, labels = gaussian(num_labels=num_labels)
    [head] = fit_heads(states, labels, [shrinkage])
    shapes = (head.center.shape, head.weights.shape, head.biases.shape)
    assert shapes == ((8,), (8, num_labels), (num_labels,))
    assert head.center.dtype == head.weights.dtype == head.biases.dtype == np.float32
    others, _ = gaussian(num_labels=num_labels, seed=1)
    expected = posterior(states, labels, shrinkage, others)
    np.testing.assert_allclose(softmax(head.scores(others)), expected, rtol=0, atol=TOLERANCE)


def test_more_dimensions_than_examples_can_be_fitted() -> None:
    states, labels = gaussian(num_examples=40, size=120)
    for shrinkage, head in zip(SHRINKAGES, fit_heads(states, labels), strict=True):
        expected = posterior(states, labels, shrinkage, states)
        np.testing.assert_allclose(softmax(head.scores(states)), expected, rtol=0, atol=1e-4)


def test_separable_labels_are_separated() -> None:
    states, labels = gaussian(distance=6.0)
    for head in fit_heads(states, labels):
        assert (head.scores(states).argmax(1) == labels).all()


def test_shrunk_to_the_identity_the_nearest_mean_decides() -> None:
    states, labels = gaussian(distance=0.5)
    means = np.stack([states[labels == k].mean(0) for k in range(3)])
    nearest = np.linalg.norm(states[:, None] - means, axis=2).argmin(1)
    [head] = fit_heads(states, labels, [1.0])
    assert (head.scores(states).argmax(1) == nearest).all()


def test_a_label_is_not_likelier_for_having_more_examples() -> None:
    states, labels = gaussian(num_labels=2)
    rare = np.flatnonzero(labels == 1)[10:]
    states, labels = np.delete(states, rare, axis=0), np.delete(labels, rare)
    [head] = fit_heads(states, labels, [0.9])
    middle = (states[labels == 0].mean(0) + states[labels == 1].mean(0)) / 2
    assert softmax(head.scores(middle)) == pytest.approx([0.5, 0.5], abs=1e-4)


def test_the_order_of_the_examples_does_not_matter() -> None:
    states, labels = gaussian()
    order = np.random.default_rng(1).permutation(len(labels))
    for a, b in zip(
        fit_heads(states, labels), fit_heads(states[order], labels[order]), strict=True
    ):
        np.testing.assert_allclose(a.scores(states), b.scores(states), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_of_the_states_does_not_matter(scale: float) -> None:
    states, labels = gaussian()
    scaled = states * np.float32(scale)
    for a, b in zip(fit_heads(states, labels), fit_heads(scaled, labels), strict=True):
        ours = softmax(b.scores(scaled))
        np.testing.assert_allclose(ours, softmax(a.scores(states)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("offset", [10.0, 100.0, 1e3, 1e4])
def test_a_dimension_that_is_large_in_all_states_does_not_matter(offset: float) -> None:
    """Some dimensions of a model's hidden states are a thousand times larger than others."""
    states, labels = gaussian(num_examples=600, size=100, distance=0.3)
    moved = states.copy()
    moved[:, 3] += np.float32(offset)
    for a, b in zip(fit_heads(states, labels), fit_heads(moved, labels), strict=True):
        expected = softmax(a.scores(states))
        np.testing.assert_allclose(softmax(b.scores(moved)), expected, rtol=0, atol=1e-3)


def test_states_are_not_modified() -> None:
    states, labels = gaussian()
    before = states.copy()
    fit_heads(states, labels)
    cross_validated(states, labels, folds_of(labels, [""] * len(labels)))
    assert np.array_equal(states, before)


def test_dimensions_that_never_change_are_harmless() -> None:
    states, labels = gaussian()
    padded = np.concatenate([states, np.full((len(states), 2), 3, np.float32)], axis=1)
    for head in fit_heads(padded, labels):
        assert np.isfinite(head.weights).all() and np.isfinite(head.biases).all()
        assert (head.scores(padded).argmax(1) == labels).mean() > 0.9


def test_scores_of_many_states_are_those_of_each() -> None:
    states, labels = gaussian(num_examples=12)
    [head] = fit_heads(states, labels, [0.9])
    together = head.scores(states.reshape(3, 4, -1))
    assert together.shape == (3, 4, 3)
    for alone, row in zip(together.reshape(12, 3), states, strict=True):
        np.testing.assert_allclose(alone, head.scores(row), rtol=1e-5)


def test_a_temperature_divides_the_scores_of_a_head() -> None:
    states, labels = gaussian()
    [head] = fit_heads(states, labels, [0.9])
    scaled = head.with_temperature(4.0)
    assert isinstance(scaled, LinearHead) and scaled.weights.dtype == np.float32
    np.testing.assert_allclose(scaled.scores(states), head.scores(states) / 4, rtol=1e-4, atol=1e-5)


# --- folds ----------------------------------------------------------------------------


def kinds_by_fold(folds: Indices, kinds: list[str]) -> dict[str, set[int]]:
    found = defaultdict(set)
    for fold, kind in zip(folds.tolist(), kinds, strict=True):
        found[kind].add(fold)
    return found


def test_examples_of_a_kind_are_held_out_together() -> None:
    kinds = [f"kind {i % 7}" for i in range(210)]
    labels = np.array([i // 7 % 3 for i in range(210)])
    folds = folds_of(labels, kinds)
    assert all(len(each) == 1 for each in kinds_by_fold(folds, kinds).values())
    assert set(folds.tolist()) == set(range(NUM_FOLDS))


def test_folds_of_kinds_are_of_similar_size() -> None:
    sizes = [40, 30, 20, 20, 10, 10, 10, 10]
    kinds = [f"kind {i}" for i, size in enumerate(sizes) for _ in range(size)]
    labels = np.arange(len(kinds)) % 2
    counts = np.bincount(folds_of(labels, kinds), minlength=NUM_FOLDS)
    assert sorted(counts.tolist()) == [20, 30, 30, 30, 40]


def assert_dealt_out(folds: Indices, labels: Indices) -> None:
    for label in set(labels.tolist()):
        counts = np.bincount(folds[labels == label], minlength=NUM_FOLDS)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("num_kinds", [1, NUM_FOLDS - 1])
def test_with_too_few_kinds_examples_are_spread_evenly(num_kinds: int) -> None:
    labels = np.arange(60) % 3
    folds = folds_of(labels, [f"kind {i // 3 % num_kinds}" for i in range(60)])
    assert_dealt_out(folds, labels)


def test_with_a_label_of_one_kind_examples_are_spread_evenly() -> None:
    labels = np.arange(60) % 3
    # The third label has only one kind: held out together, none of its examples would be left.
    kinds = ["odd" if label == 2 else f"kind {i % 8}" for i, label in enumerate(labels)]
    folds = folds_of(labels, kinds)
    assert_dealt_out(folds, labels)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abcdefgh")), min_size=1, max_size=60))
def test_every_label_has_examples_outside_every_fold(rows: list[tuple[int, str]]) -> None:
    # Ten of each label at least, as a task has.
    rows = rows + [(label, "a") for label in range(4) for _ in range(10)]
    labels, kinds = np.array([label for label, _ in rows]), [kind for _, kind in rows]
    folds = folds_of(labels, kinds)
    assert folds.shape == labels.shape
    assert set(folds.tolist()) <= set(range(NUM_FOLDS))
    for fold in range(NUM_FOLDS):
        assert set(labels[folds != fold].tolist()) == {0, 1, 2, 3}
    is_together = all(len(each) == 1 for each in kinds_by_fold(folds, kinds).values())
    if not is_together:
        assert_dealt_out(folds, labels)


# --- cross-validation -----------------------------------------------------------------


def test_examples_are_scored_by_heads_that_have_not_seen_their_fold() -> None:
    states, labels = gaussian(num_examples=60)
    folds = folds_of(labels, [f"kind {i % 6}" for i in range(60)])
    found = cross_validated(states, labels, folds)
    assert len(found) == len(SHRINKAGES)
    for i, scores in enumerate(found):
        assert scores.shape == (60, 3)
        for row in range(60):
            others = folds != folds[row]
            head = fit_heads(states[others], labels[others])[i]
            np.testing.assert_allclose(scores[row], head.scores(states[row]), rtol=1e-4, atol=1e-3)


def test_unpredictable_labels_are_guessed() -> None:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(300, 200)).astype(np.float32)
    labels = rng.permutation(np.arange(300) % 3)
    [fitted, *_] = fit_heads(states, labels)
    assert (fitted.scores(states).argmax(1) == labels).mean() > 0.7, "its own examples"
    for scores in cross_validated(states, labels, folds_of(labels, [""] * 300)):
        assert (scores.argmax(1) == labels).mean() < 0.45
        # With a loss about that of equal probabilities: no better, and hardly worse.
        assert calibrate(scores, labels).log_loss == pytest.approx(math.log(3), abs=0.02)


# --- calibration ----------------------------------------------------------------------


def truthful(num_examples: int = 5000) -> tuple[Doubles, Indices]:
    """Scores whose softmax are the frequencies of the labels."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(num_examples, 3)) * 2
    noise = rng.gumbel(size=scores.shape)
    return scores, (scores + noise).argmax(1)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0, 20.0])
def test_the_temperature_corrects_overconfident_and_underconfident_scores(
    factor: float,
) -> None:
    scores, labels = truthful()
    found = calibrate((scores * factor).astype(np.float32), labels)
    assert found.temperature == pytest.approx(factor, rel=0.08)
    assert found.log_loss == pytest.approx(log_loss(scores.astype(np.float32), labels), abs=1e-3)
    assert found.accuracy == (scores.argmax(1) == labels).mean()


def test_no_temperature_is_better_than_the_one_that_is_found() -> None:
    scores, labels = truthful(200)
    overconfident = (scores * 5).astype(np.float32)
    found = calibrate(overconfident, labels)
    losses = [log_loss(overconfident / np.float32(t), labels) for t in TEMPERATURES]
    assert found.log_loss == pytest.approx(min(losses), abs=1e-6)
    assert found.log_loss < log_loss(overconfident, labels)


def test_scores_that_are_all_wrong_get_the_highest_temperature() -> None:
    labels = np.arange(30) % 2
    scores = np.eye(2, dtype=np.float32)[1 - labels] * 50
    found = calibrate(scores, labels)
    assert found.temperature == pytest.approx(64)
    assert found.accuracy == 0.0


def test_log_loss_is_the_mean_of_minus_log_p() -> None:
    # Softmax of the rows: 3/4 and 1/4; 1/2 and 1/2; 1/6, of six.
    scores = np.array([[math.log(3), 0.0], [7.0, 7.0]], dtype=np.float32)
    assert log_loss(scores, np.array([0, 1])) == pytest.approx(
        -(math.log(3 / 4) + math.log(1 / 2)) / 2
    )
    assert log_loss(scores, np.array([1, 1])) == pytest.approx(
        -(math.log(1 / 4) + math.log(1 / 2)) / 2
    )
    assert log_loss(np.zeros((1, 6), np.float32), np.array([4])) == pytest.approx(math.log(6))


def test_log_loss_of_large_scores_neither_overflows_nor_depends_on_a_constant() -> None:
    scores = np.array([[1e4, 0.0]], dtype=np.float32)
    assert log_loss(scores, np.array([1])) == pytest.approx(1e4)
    assert log_loss(scores, np.array([0])) == 0.0
    small = np.array([[1.5, 0.25]], dtype=np.float32)
    assert log_loss(small + 1000, np.array([1])) == pytest.approx(log_loss(small, np.array([1])))
