"""The kernel inception distance (KID): an unbiased squared MMD with a cubic kernel, and its standard error.

Binkowski, Sutherland, Arbel, Gretton: Demystifying MMD GANs (2018).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vaedist.evaluation.metrics.features import Matrix

_GROUPS = 20


def kid(x: Matrix, y: Matrix, *, seed: int) -> tuple[float, float]:
    """Unbiased squared MMD over all pairs, and its jackknife standard error.

    With k(a, b) = (a.b / D + 1)^3, the estimate is
    sum_{i != j} k(x_i, x_j) / (n (n - 1)) + the same of y - 2 sum k(x_i, y_j) / (n m). Both sets are cut at random
    into 20 parts; sums of k over pairs of parts give the estimate and each leave-one-part-out estimate at once. For
    equal laws, where the estimate's first-order term vanishes, that error is too large by a factor of sqrt(2).

    Args:
        x, y: (N, D) and (M, D), at least 4 rows each.
        seed: Of the cut. The estimate itself does not depend on it beyond rounding.
    """
    groups = min(_GROUPS, len(x) // 2, len(y) // 2)
    assert groups >= 2
    rng = np.random.Generator(np.random.PCG64(seed))
    xs, ys = (np.array_split(one[rng.permutation(len(one))], groups) for one in (x, y))
    own_x, own_y, cross = (np.zeros((groups, groups)) for _ in range(3))
    for a in range(groups):
        for b in range(groups):
            cross[a, b] = _kernel(xs[a], ys[b]).sum()
            if b >= a:
                own_x[a, b] = own_x[b, a] = _kernel_sum(xs[a], xs[b], same=a == b)
                own_y[a, b] = own_y[b, a] = _kernel_sum(ys[a], ys[b], same=a == b)
    n, m = (np.array([len(part) for part in parts]) for parts in (xs, ys))

    def estimate(keep: NDArray[np.bool_]) -> float:
        block = np.ix_(keep, keep)
        rows, others = int(n[keep].sum()), int(m[keep].sum())
        return float(
            own_x[block].sum() / (rows * (rows - 1))
            + own_y[block].sum() / (others * (others - 1))
            - 2 * cross[block].sum() / (rows * others)
        )

    left_out = np.array([estimate(np.arange(groups) != g) for g in range(groups)])
    error = math.sqrt((groups - 1) / groups * float(((left_out - left_out.mean()) ** 2).sum()))
    return estimate(np.ones(groups, bool)), error


def _kernel(a: Matrix, b: Matrix) -> Matrix:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _kernel_sum(a: Matrix, b: Matrix, *, same: bool) -> float:
    values = _kernel(a, b)
    return float(values.sum() - (np.trace(values) if same else 0.0))
