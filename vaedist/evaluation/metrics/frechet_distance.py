"""The Frechet distance of features (FID, were they an Inception network's), and its value for infinitely many images.

The Frechet distance of n images is too large by about b / n, and b depends on the generator too, so that even a
ranking at equal n can be wrong (Chong and Forsyth: Effectively unbiased FID and Inception Score, 2020). The remedy
is theirs: a straight line in 1/n, here through disjoint parts of the sets, so that every image counts once at each
size.

Heusel et al.: GANs trained by a two time-scale update rule (2017).
"""

from __future__ import annotations

import math

import numpy as np

from vaedist.evaluation.metrics.features import Matrix

_MOST_PARTS = 4


def frechet(x: Matrix, y: Matrix) -> float:
    """|m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)), with the unbiased covariances S; at least 2 rows each.

    tr (S_x S_y)^(1/2) is the sum of the singular values of R_x R_y^T, where S = R^T R and R is the triangle of
    the QR decomposition of the centered features: no square root of a matrix, and no trouble where S is singular.
    """
    r, s = _root(x), _root(y)
    shared = np.linalg.svd(r @ s.T)[1].sum()
    shift = ((x.mean(0) - y.mean(0)) ** 2).sum()
    # Where both sets are equal the sum is 0 but for rounding.
    return max(0.0, float(shift + (r**2).sum() + (s**2).sum() - 2 * shared))


def _root(x: Matrix) -> Matrix:
    """R with R^T R the unbiased covariance of the rows."""
    root: Matrix = np.linalg.qr(x - x.mean(0))[1] / math.sqrt(len(x) - 1)
    return root


def frechet_extrapolated(x: Matrix, y: Matrix, *, seed: int) -> float:
    """The Frechet distance at 1/n = 0, on the least-squares line through its values at n = N, N/2, N/3, N/4.

    N is the smaller count; each value is the mean over the disjoint parts of that size. Sizes below 2 D, where the
    bias no longer falls as 1/n, are left out; N must be at least 4 D.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    count = min(len(x), len(y))
    a, b = (one[rng.permutation(len(one))[:count]] for one in (x, y))
    parts = range(1, min(_MOST_PARTS, count // (2 * x.shape[1])) + 1)
    assert len(parts) >= 2
    values = [
        np.mean([frechet(*pair) for pair in zip(np.array_split(a, k), np.array_split(b, k), strict=True)])
        for k in parts
    ]
    _, intercept = np.polyfit(np.array(parts) / count, values, 1)
    return float(intercept)
