"""Linear heads: from a vector to labels, fitted in closed form. Knows arrays, not texts.

N examples, C numbers of a hidden state, K labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_FOLDS = 5
# Only strong shrinkage is tried. Less shrinkage gives a lower cross-validated loss on the examples
# but a lower accuracy on texts from other sources: on 1,800 of them 0.9 was 1 to 3 points better
# than 0.3 (benchmarks/LOG.md).
SHRINKAGES = (0.9, 0.95, 0.98)
TEMPERATURES = np.geomspace(0.25, 64, 97)

Floats = NDArray[np.float32]
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class LinearHead:
    """center: (C,). weights: (C, K). biases: (K,).

    The softmax of the scores gives the labels' probabilities.
    """

    center: Floats
    weights: Floats
    biases: Floats

    def scores(self, states: Floats) -> Floats:
        """(..., C) -> (..., K), natural logarithms up to a constant."""
        # Centered first: some numbers of a hidden state are large and nearly constant.
        centered = np.asarray(states - self.center, dtype=np.float32)
        scores: Floats = centered @ self.weights + self.biases
        return scores

    def cooled(self, temperature: float) -> "LinearHead":
        """The same head, its scores divided by the temperature."""
        scale = np.float32(1 / temperature)
        return LinearHead(self.center, self.weights * scale, self.biases * scale)


@dataclass(frozen=True)
class Calibration:
    """How well scores fit labels that they were not fitted to, at the best temperature.

    log_loss: mean over the examples, in nats.
    """

    temperature: float
    log_loss: float
    accuracy: float


def fit_heads(
    states: Floats,
    labels: Indices,
    shrinkages: Sequence[float] = SHRINKAGES,
    weights: Floats | None = None,
) -> list[LinearHead]:
    """Linear discriminant analysis with a shrunk covariance, one head for each shrinkage.

    A head's scores are x S^-1 m_k - m_k S^-1 m_k / 2 for the mean m_k of each label, with equal
    priors (Hastie, Tibshirani, Friedman: The Elements of Statistical Learning, eq. 4.10). S is
    the covariance within the labels, shrunk towards a multiple of the identity with the same
    trace (Friedman: Regularized Discriminant Analysis, 1989, eq. 18).

    states: (N, C). labels: (N,), from 0, each with an example at least.
    shrinkages: between 0, the covariance as it is, and 1, the identity alone.
    weights: (N,), how much each example counts in means and covariance; None: all the same.
    """
    center = states.mean(0, dtype=np.float64).astype(np.float32)
    states = states - center
    means = np.stack([_mean(states, weights, labels == k) for k in range(labels.max() + 1)])
    residuals = states - means[labels]
    if weights is None:
        covariance = residuals.T @ residuals / len(states)
    else:
        covariance = (residuals * weights[:, None]).T @ residuals / weights.sum()
    size = len(covariance)
    mean_variance = max(float(covariance.trace()) / size, float(np.finfo(np.float32).tiny))
    heads = []
    for shrinkage in shrinkages:
        shrunk = (1 - shrinkage) * covariance
        shrunk.flat[:: size + 1] += shrinkage * mean_variance
        slopes = np.linalg.solve(shrunk, means.T).astype(np.float32)
        heads.append(LinearHead(center, slopes, -0.5 * np.einsum("kc,ck->k", means, slopes)))
    return heads


def _mean(states: Floats, weights: Floats | None, chosen: NDArray[np.bool_]) -> Floats:
    mean: Floats = np.average(
        states[chosen], axis=0, weights=None if weights is None else weights[chosen]
    )
    return mean


def folds_of(labels: Indices, kinds: Sequence[str]) -> Indices:
    """The number of the fold that each example is left out with: (N,).

    Kinds stay together, because texts of a kind that was left out are as different from the
    others as those of real users are. Where there are fewer kinds than folds, or a label would
    have no example of another kind, every label is dealt out evenly.
    """
    sizes = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    loads = [0] * NUM_FOLDS
    fold_of = {}
    for kind in sorted(sizes, key=lambda kind: -sizes[kind]):
        fold_of[kind] = loads.index(min(loads))
        loads[fold_of[kind]] += sizes[kind]
    folds = np.array([fold_of[kind] for kind in kinds])
    num_labels = len(set(labels.tolist()))
    is_complete = all(len(set(labels[folds != fold])) == num_labels for fold in range(NUM_FOLDS))
    if len(sizes) >= NUM_FOLDS and is_complete:
        return folds
    seen = [0] * num_labels
    for i, label in enumerate(labels):
        folds[i] = seen[label] % NUM_FOLDS
        seen[label] += 1
    return folds


def cross_validated(states: Floats, labels: Indices, folds: Indices) -> list[Floats]:
    """Scores of every example by heads that were fitted without its fold: (N, K) a shrinkage."""
    num_labels = int(labels.max()) + 1
    scores = [np.zeros((len(states), num_labels), np.float32) for _ in SHRINKAGES]
    for fold in sorted(set(folds.tolist())):
        is_left_out = folds == fold
        heads = fit_heads(states[~is_left_out], labels[~is_left_out])
        for out, head in zip(scores, heads, strict=True):
            out[is_left_out] = head.scores(states[is_left_out])
    return scores


def calibrate(scores: Floats, labels: Indices) -> Calibration:
    """The temperature with the least log-loss; scores: (N, K), labels: (N,)."""
    losses = [log_loss(scores / t, labels) for t in TEMPERATURES]
    best = int(np.argmin(losses))
    accuracy = float((scores.argmax(1) == labels).mean())
    return Calibration(float(TEMPERATURES[best]), losses[best], accuracy)


def log_loss(scores: Floats, labels: Indices) -> float:
    """Mean of -log p of the labels, where p is the softmax of the scores; in nats."""
    scores = scores.astype(np.float64)
    highest = scores.max(1, keepdims=True)
    logs = scores - highest - np.log(np.exp(scores - highest).sum(1, keepdims=True))
    return float(-logs[np.arange(len(labels)), labels].mean())
