"""Metrics of predicted labels against true ones. Knows arrays, not texts.

N texts, K labels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 10
Z_95 = 1.96

Counts = NDArray[np.intp]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class LabelQuality:
    """Metrics of one label. recall_interval: 95 %, lower and upper end."""

    num_texts: int
    precision: float
    recall: float
    recall_interval: tuple[float, float]
    f1: float


@dataclass(frozen=True)
class Quality:
    """Metrics of all predictions. confusion: (K, K) numbers of texts, a row for each true label.

    accuracy_interval: 95 %, lower and upper end. per_label: (K,), None for a label without texts.
    macro_f1: the mean over the labels with texts.
    """

    accuracy: float
    accuracy_interval: tuple[float, float]
    macro_f1: float
    calibration_error: float
    confusion: tuple[tuple[int, ...], ...]
    per_label: tuple[LabelQuality | None, ...]


def quality(given: Sequence[int], true: Sequence[int], probabilities: Doubles) -> Quality:
    """The metrics of N predictions. given, true: indices of labels. probabilities: (N, K)."""
    num_labels = probabilities.shape[1]
    confusion = np.zeros((num_labels, num_labels), dtype=np.intp)
    np.add.at(confusion, (np.asarray(true), np.asarray(given)), 1)
    is_right = [a == b for a, b in zip(given, true, strict=True)]
    per_label = tuple(_label_quality(confusion, k) for k in range(num_labels))
    return Quality(
        accuracy=sum(is_right) / len(is_right),
        accuracy_interval=wilson(sum(is_right), len(is_right)),
        macro_f1=float(np.mean([each.f1 for each in per_label if each is not None])),
        calibration_error=calibration_error(probabilities, is_right),
        confusion=tuple(map(tuple, confusion.tolist())),
        per_label=per_label,
    )


def _label_quality(confusion: Counts, k: int) -> LabelQuality | None:
    num_right, num_true, num_given = (
        int(each) for each in (confusion[k, k], confusion[k].sum(), confusion[:, k].sum())
    )
    if num_true == 0:
        return None
    return LabelQuality(
        num_texts=num_true,
        precision=num_right / num_given if num_given else 0.0,
        recall=num_right / num_true,
        recall_interval=wilson(num_right, num_true),
        f1=2 * num_right / (num_true + num_given),
    )


def wilson(num_right: int, num_all: int, z: float = Z_95) -> tuple[float, float]:
    """The confidence interval of a share (Wilson, 1927), 95 % by default."""
    share, n = num_right / num_all, num_all
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def reliability(probabilities: Doubles, is_right: Sequence[bool]) -> list[tuple[int, float, float]]:
    """For each confidence bin with texts: their number, mean confidence, accuracy."""
    confidences, right = probabilities.max(1), np.array(is_right)
    bins = np.minimum((confidences * NUM_BINS).astype(int), NUM_BINS - 1)
    return [
        (int((bins == b).sum()), float(confidences[bins == b].mean()),
         float(right[bins == b].mean()))
        for b in range(NUM_BINS) if (bins == b).any()
    ]  # fmt: skip


def calibration_error(probabilities: Doubles, is_right: Sequence[bool]) -> float:
    """Expected calibration error: mean of |confidence - accuracy| over bins, weighted by size."""
    bins = reliability(probabilities, is_right)
    return sum(n * abs(confidence - accuracy) for n, confidence, accuracy in bins) / len(is_right)


def chance_of(num_better: int, num_worse: int) -> float:
    """The probability of `num_better` or more wins if wins and losses were equally likely.

    This is the one-sided exact sign test; for two judges of the same texts, McNemar's test.
    """
    n = num_better + num_worse
    return float(sum(math.comb(n, k) for k in range(num_better, n + 1)) / 2**n)


def expected_accuracy(num_rows: Sequence[int], accuracies: Sequence[float], of: int) -> float:
    """The expected accuracy with `of` rows, extrapolated from the accuracies with fewer rows.

    Assumes that the error falls as a power of the number of rows (arXiv 1712.00409), which is
    fitted to the logarithms by least squares; a rising fit is replaced by a constant.
    """
    log_errors = np.log(np.maximum(1 - np.asarray(accuracies), 1e-3))
    slope, intercept = np.polyfit(np.log(num_rows), log_errors, 1)
    if slope > 0:
        slope, intercept = 0.0, log_errors.mean()
    return float(1 - math.exp(intercept + slope * math.log(of)))
