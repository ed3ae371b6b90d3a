"""Precision, recall, density and coverage: which images lie within the k-nearest-neighbor balls of the other set.

Kynkaanniemi et al.: Improved precision and recall (2019). Naeem et al.: Reliable fidelity and diversity metrics (2020).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vaedist.evaluation.metrics.features import Matrix

NEIGHBORS = 5
_CHUNK = 1024  # rows of a distance matrix held at a time


def precision_recall(x: Matrix, y: Matrix, k: int = NEIGHBORS) -> dict[str, float]:
    """`precision`, `recall`, `density`, `coverage` of generated `y` against real `x`; more than k rows each.

    A ball reaches from an image to its k-th nearest neighbor in its own set, itself not counted, bound included.
    """
    assert min(len(x), len(y)) > k
    real, made = (_radii(one, k) for one in (x, y))
    inside = np.zeros(len(y), np.int64)  # real balls that hold each generated image
    recalled, covered = np.zeros(len(x), bool), np.zeros(len(x), bool)
    for rows, distances in _distances(x, y):
        within = distances <= real[rows, None]
        inside += within.sum(0)
        covered[rows] = within.any(1)
        recalled[rows] = (distances <= made).any(1)
    return {
        "precision": float((inside > 0).mean()),
        "recall": float(recalled.mean()),
        "density": float(inside.mean() / k),
        "coverage": float(covered.mean()),
    }


def _radii(x: Matrix, k: int) -> Matrix:
    """Squared distance of each row to its k-th nearest other row."""
    found = np.empty(len(x))
    for rows, distances in _distances(x, x):
        distances[np.arange(len(distances)), np.arange(rows.start, rows.start + len(distances))] = np.inf
        found[rows] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return found


def _distances(x: Matrix, y: Matrix) -> Iterator[tuple[slice, Matrix]]:
    """Squared distances of the rows of `x` to all rows of `y`, a chunk of `x` at a time."""
    squares = (y**2).sum(1)
    for start in range(0, len(x), _CHUNK):
        part = x[start : start + _CHUNK]
        gaps = (part**2).sum(1)[:, None] - 2 * part @ y.T + squares
        yield slice(start, start + len(part)), np.maximum(gaps, 0)
