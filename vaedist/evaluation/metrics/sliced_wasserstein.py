"""The sliced 2-Wasserstein distance, of features or of pixels.

Bonneel et al.: Sliced and Radon Wasserstein barycenters (2015).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaedist.evaluation.metrics.features import Matrix

DIRECTIONS = 256


def sliced_wasserstein(x: NDArray[Any], y: NDArray[Any], *, seed: int, directions: int = DIRECTIONS) -> float:
    """Root mean square of W_2 of the projections on `directions` random unit vectors; (N, D) and (M, D).

    In one dimension W_2^2 = int (F_x^-1(u) - F_y^-1(u))^2 du, exactly, for any two counts. A shift of everything by v
    gives about |v| / sqrt(D): for pixels, the root mean square shift of a pixel.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    size = x.shape[1]
    axes = rng.standard_normal((size, directions), dtype=np.float32).astype(x.dtype)
    axes /= np.linalg.norm(axes, axis=0)
    return math.sqrt(float(np.mean(_wasserstein_squared(x @ axes, y @ axes))))


def _wasserstein_squared(x: NDArray[Any], y: NDArray[Any]) -> Matrix:
    """W_2^2 between the columns of (N, K) and (M, K)."""
    n, m = len(x), len(y)
    # Quantile functions are steps at i/n and j/m; in units of 1/(n m) all steps are whole numbers.
    cuts = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    starts, widths = cuts[:-1], np.diff(cuts) / (n * m)
    x, y = (np.sort(one.astype(np.float64), axis=0) for one in (x, y))
    gaps: Matrix = widths @ (x[starts // m] - y[starts // n]) ** 2
    return gaps
