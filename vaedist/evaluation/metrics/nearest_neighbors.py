"""The nearest image of a large set, and the nearest that does not belong with it.

|a - b|^2 = |a|^2 - 2 a.b + |b|^2 turns all pairs into products of matrices, a block at a time in fp32. The distance
of the pairs that win is then computed again from their difference, in fp64: near duplicates are what is looked
for, and they are what that formula loses to rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHUNK_VALUES = 1 << 24

Distances = NDArray[np.float64]
Numbers = NDArray[np.intp]


def nearest_two(
    queries: NDArray[Any], train: NDArray[Any], groups: Numbers
) -> tuple[tuple[Distances, Numbers], tuple[Distances, Numbers]]:
    """Distance and number of each query's nearest training row, and of the nearest in another group than that one's.

    Distances are root mean square differences per dimension, exact for the rows found. Of uint8 rows: of values / 255.

    Args:
        queries: (n, D).
        train: (N, D).
        groups: (N,) group of each training row.

    Returns:
        Two pairs (n,), (n,); infinity and -1 in the second where there is one group alone.
    """
    best = np.full((len(queries), 2), np.inf)
    where = np.full((len(queries), 2), -1, np.intp)
    rows = max(1, _CHUNK_VALUES // max(train.shape[1], len(queries)))
    step = max(1, _CHUNK_VALUES // max(train.shape[1], rows))

    def merge(part: slice, gaps: NDArray[Any], first_row: int) -> None:
        """The nearest two, of different groups, among a block (n', N') and those found before."""
        row = np.arange(len(gaps))
        first = gaps.argmin(1)
        strange = groups[first_row : first_row + gaps.shape[1]] != groups[first_row + first][:, None]
        second = np.where(strange, gaps, np.inf).argmin(1)
        found = np.where(strange[row, second], gaps[row, second], np.inf)
        values = np.column_stack([best[part], gaps[row, first], found])
        numbers = np.column_stack([where[part], first_row + first, first_row + second])
        winner = values.argmin(1)
        own = groups[numbers] == groups[numbers[row, winner]][:, None]
        runner = np.where(own, np.inf, values).argmin(1)
        best[part] = np.column_stack([values[row, winner], np.where(own, np.inf, values)[row, runner]])
        where[part] = np.column_stack([numbers[row, winner], numbers[row, runner]])

    for start in range(0, len(train), rows):
        others = _floats(train[start : start + rows])
        squares = (others**2).sum(1)
        for first in range(0, len(queries), step):
            part = slice(first, first + step)
            # + |query|^2, the same for all of them
            merge(part, squares - 2 * _floats(queries[part]) @ others.T, start)
    found = [
        (np.where(np.isfinite(best[:, i]), _exact(queries, train[where[:, i]]), np.inf), where[:, i])
        for i in (0, 1)
    ]
    return found[0], found[1]


def _floats(rows: NDArray[Any]) -> NDArray[np.float32]:
    return rows.astype(np.float32) / np.float32(255 if rows.dtype == np.uint8 else 1)


def _exact(a: NDArray[Any], b: NDArray[Any]) -> Distances:
    """Root mean square difference of row pairs; the sums above lose near duplicates to rounding."""
    scale = 255.0 if a.dtype == np.uint8 else 1.0
    gaps = [np.mean(((x.astype(np.float64) - y) / scale) ** 2) for x, y in zip(a, b, strict=True)]
    return np.sqrt(np.array(gaps))
