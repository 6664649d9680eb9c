"""Fits a head to a user's own rows, with the task's examples or without them.

Knows hidden states and labels, not texts. N texts, L layers, C hidden size, K labels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from server.core.roles.heads import (
    Calibration,
    Floats,
    Indices,
    LinearHead,
    calibrate,
    fit_heads,
    folds_of,
)

# The weights of an example that are tried; a row has weight 1.
EXAMPLE_WEIGHTS = (0.0, 0.1, 1.0)
# Rows come from the same source as the texts judged later, so less shrinkage is tried than with
# examples alone (server/core/roles/heads.py).
SHRINKAGES = (0.3, 0.6, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Measured:
    """Hidden states of labelled texts. states: (N, L, C), after the layers. labels: (N,)."""

    states: Floats
    labels: Indices

    def __getitem__(self, chosen: Indices) -> "Measured":
        """The texts at these indices."""
        return Measured(self.states[chosen], self.labels[chosen])

    def __len__(self) -> int:
        """The number of texts."""
        return len(self.labels)


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a head, and their calibration on held-out rows."""

    layer_index: int
    shrinkage: float
    example_weight: float
    calibration: Calibration

    def fit(self, rows: Measured, examples: Measured) -> LinearHead:
        """A head at the temperature that fits held-out rows best."""
        [head] = _fit(self.layer_index, (self.shrinkage,), self.example_weight, rows, examples)
        return head.with_temperature(self.calibration.temperature)


def choose_recipe(rows: Measured, examples: Measured, num_labels: int) -> Recipe:
    """The recipe with the lowest log-loss on held-out rows, by cross-validation.

    rows: at least two of every label that occurs. examples: the task's; needed only for labels
    without rows.
    """
    folds = folds_of(_renumbered(rows.labels), [""] * len(rows))
    recipes = [
        Recipe(layer_index, shrinkage, weight, calibrate(scores, rows.labels))
        for layer_index in range(rows.states.shape[1])
        for weight in _weights(rows, examples, num_labels)
        for shrinkage, scores in _held_out_scores(layer_index, weight, rows, examples, folds)
    ]
    return min(recipes, key=lambda recipe: recipe.calibration.log_loss)


def _renumbered(labels: Indices) -> Indices:
    """The labels, numbered from 0 without gaps."""
    return np.unique(labels, return_inverse=True)[1]


def _weights(rows: Measured, examples: Measured, num_labels: int) -> tuple[float, ...]:
    if not len(examples):
        return EXAMPLE_WEIGHTS[:1]
    # A label without rows can be learned from the examples only.
    return EXAMPLE_WEIGHTS if len(set(rows.labels.tolist())) == num_labels else EXAMPLE_WEIGHTS[1:]


def _held_out_scores(
    layer_index: int, weight: float, rows: Measured, examples: Measured, folds: Indices
) -> Iterator[tuple[float, Floats]]:
    """For each shrinkage, the scores of every row by a head fitted without its fold."""
    num_labels = int(max([rows.labels.max(), *examples.labels])) + 1
    scores = np.zeros((len(SHRINKAGES), len(rows), num_labels), np.float32)
    for fold in sorted(set(folds.tolist())):
        held_out, rest = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        heads = _fit(layer_index, SHRINKAGES, weight, rows[rest], examples)
        for i, head in enumerate(heads):
            scores[i, held_out] = head.scores(rows.states[held_out, layer_index])
    return zip(SHRINKAGES, scores, strict=True)


def _fit(
    layer_index: int,
    shrinkages: tuple[float, ...],
    example_weight: float,
    rows: Measured,
    examples: Measured,
) -> list[LinearHead]:
    states, labels = rows.states[:, layer_index], rows.labels
    if example_weight == 0:
        return fit_heads(states, labels, shrinkages)
    weights = np.concatenate([np.ones(len(rows)), np.full(len(examples), example_weight)])
    return fit_heads(
        np.concatenate([states, examples.states[:, layer_index]]),
        np.concatenate([labels, examples.labels]),
        shrinkages,
        weights.astype(np.float32),
    )
