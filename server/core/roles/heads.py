"""Linear heads from hidden states to labels, fitted in closed form. Knows arrays, not texts.

N examples, C hidden size, K labels.
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
        """(..., C) -> (..., K), log-probabilities (nats) up to a constant."""
        # Centered first: some dimensions of a hidden state are large and nearly constant.
        centered = np.asarray(states - self.center, dtype=np.float32)
        scores: Floats = centered @ self.weights + self.biases
        return scores

    def with_temperature(self, temperature: float) -> "LinearHead":
        """The same head with its scores divided by the temperature."""
        scale = np.float32(1 / temperature)
        return LinearHead(self.center, self.weights * scale, self.biases * scale)


@dataclass(frozen=True)
class Calibration:
    """The best temperature for held-out scores, and how well they fit the labels there.

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

    states: (N, C). labels: (N,), from 0, each with at least one example.
    shrinkages: between 0 (the covariance itself) and 1 (only the identity).
    weights: (N,), of the examples in means and covariance; None: all equal.
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
    """The fold in which each example is held out: (N,).

    Examples of a kind share a fold, so that held-out texts differ from the rest as much as real
    users' texts do. If there are fewer kinds than folds, or a fold would hold all examples of a
    label, the examples of every label are spread evenly over the folds instead.
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
    """For each shrinkage, the scores (N, K) of every example by a head fitted without its fold."""
    num_labels = int(labels.max()) + 1
    scores = [np.zeros((len(states), num_labels), np.float32) for _ in SHRINKAGES]
    for fold in sorted(set(folds.tolist())):
        is_held_out = folds == fold
        heads = fit_heads(states[~is_held_out], labels[~is_held_out])
        for out, head in zip(scores, heads, strict=True):
            out[is_held_out] = head.scores(states[is_held_out])
    return scores


def calibrate(scores: Floats, labels: Indices) -> Calibration:
    """The temperature with the lowest log-loss. scores: (N, K), labels: (N,)."""
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
