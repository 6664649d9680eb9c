"""Metrics compared with independent formulas and known values."""

import math

import numpy as np
import pytest

from server.core.roles.measures import (
    calibration_error,
    chance_of,
    expected_accuracy,
    quality,
    wilson,
)

TRUE = [0, 0, 0, 0, 1, 1, 1, 0]
GIVEN = [0, 0, 0, 1, 1, 1, 0, 2]
PROBABILITIES = np.full((8, 3), 0.05) + 0.85 * np.eye(3)[GIVEN]


def test_metrics_equal_those_counted_by_hand() -> None:
    found = quality(GIVEN, TRUE, PROBABILITIES)
    assert found.accuracy == 5 / 8
    assert found.confusion == ((3, 1, 1), (1, 2, 0), (0, 0, 0))
    first, second, third = found.per_label
    assert first is not None and second is not None and third is None
    assert (first.num_texts, first.precision, first.recall) == (5, 3 / 4, 3 / 5)
    assert first.f1 == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert (second.precision, second.recall) == (2 / 3, 2 / 3)
    assert found.macro_f1 == pytest.approx((first.f1 + second.f1) / 2)
    assert found.calibration_error == pytest.approx(abs(0.9 - 5 / 8))


def test_a_label_that_is_never_predicted_has_no_precision() -> None:
    found = quality([0, 0], [0, 1], np.array([[0.6, 0.4]] * 2))
    assert found.per_label[1] is not None
    assert (found.per_label[1].precision, found.per_label[1].f1) == (0.0, 0.0)


def test_the_interval_is_wilsons() -> None:
    # Newcombe (1998), table I: 81 of 263, and none of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    low, high = wilson(5, 5)
    assert low < 1 and high == 1


def test_a_calibrated_confidence_has_no_error() -> None:
    probabilities = np.array([[0.75, 0.25]] * 4)
    assert calibration_error(probabilities, [True, True, True, False]) == 0


@pytest.mark.parametrize(
    ("better", "worse", "chance"),
    [(0, 0, 1.0), (5, 0, 1 / 32), (3, 1, 5 / 16), (1, 3, 15 / 16), (500, 500, 0.5126)],
)
def test_the_sign_test_is_that_of_coin_tosses(better: int, worse: int, chance: float) -> None:
    assert chance_of(better, worse) == pytest.approx(chance, abs=1e-4)


def test_a_power_law_is_extrapolated() -> None:
    num_rows = [50, 100, 200, 400]
    accuracies = [1 - 2 * n**-0.4 for n in num_rows]
    assert expected_accuracy(num_rows, accuracies, 800) == pytest.approx(1 - 2 * 800**-0.4)


def test_more_rows_never_lower_the_expected_accuracy() -> None:
    expected = expected_accuracy([10, 20, 40], [0.9, 0.8, 0.7], 80)
    assert 0.7 < expected < 0.9


def test_an_accuracy_of_one_is_extrapolated_without_infinities() -> None:
    assert math.isfinite(expected_accuracy([10, 20], [1.0, 1.0], 40))
