"""How far generated images are from real ones, as distributions of features.

Every number is a function of two sets of images, taken through uint8, and of an extractor (`metrics.features`),
whose label is part of its name: `kid[vd-1a2b3c4d]`. Numbers compare where names, real set and counts are equal.

| name | what | better |
|---|---|---|
| `kid` | unbiased squared MMD, kernel (x.y / D + 1)^3: for equal laws 0 on average, so often below 0 | low |
| `kid_error` | its standard error: delete-a-group jackknife, images taken as independent | |
| `frechet` | squared Frechet distance of two Gaussians with the sets' moments; biased upwards | low |
| `frechet_extrapolated` | the same, extrapolated to infinitely many images; noisier, may be below 0 | low |
| `precision` | share of generated images within the k-th-neighbour ball of some real image (k = 5) | high |
| `recall` | share of real images within the ball of some generated image | high |
| `density` | how many real balls a generated image lies in, over k: about 1 for equal laws | high |
| `coverage` | share of real images whose ball holds a generated image | high |
| `sliced_wasserstein` | 2-Wasserstein distance of projections, root mean square over 256 fixed directions | low |
| `sliced_wasserstein[pixels]` | the same of the pixels in [0, 1], with no network at all | low |
| `inception_score` | exp of the mutual information of image and class, by the extractor's logits | high |

The Frechet distance of n images is too large by about b / n, and b depends on the generator too, so that even a
ranking at equal n can be wrong (Chong and Forsyth: Effectively unbiased FID and Inception Score, 2020). The remedy
is theirs: a straight line in 1/n, here through disjoint parts of the sets, so that every image counts once at each
size. It wants at least four times as many images as features (512, from 128 pixels a side 1,024), and is not defined
below that. The KID has no such bias and is what small sets are judged by. The Inception Score never looks at a
real image, and its classes are the extractor's.

Binkowski, Sutherland, Arbel, Gretton: Demystifying MMD GANs (2018). Heusel et al.: GANs trained by a two time-scale
update rule (2017). Kynkaanniemi et al.: Improved precision and recall (2019). Naeem et al.: Reliable fidelity
and diversity metrics (2020). Bonneel et al.: Sliced and Radon Wasserstein barycenters (2015). Salimans et al.:
Improved techniques for training GANs (2016).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vaedist.core.errors import UserError, did_you_mean
from vaedist.core.imaging import Pixels
from vaedist.evaluation.metrics.features import Extractor

SAMPLE_METRICS: Mapping[str, Literal["min", "max"]] = {
    "kid": "min",
    "frechet": "min",
    "frechet_extrapolated": "min",
    "precision": "max",
    "recall": "max",
    "density": "max",
    "coverage": "max",
    "sliced_wasserstein": "min",
    "inception_score": "max",
}
"""Plain names that a job may monitor, and which way is better."""
PIXELS = "sliced_wasserstein[pixels]"
NEIGHBOURS = 5
DIRECTIONS = 256
_GROUPS = 20
_CHUNK = 1024  # rows of a kernel or distance matrix held at a time

Matrix = NDArray[np.float64]


class Reference:
    """The real images and their features: made once, compared with many generated sets.

    Args:
        images: uint8 (N, C, H, W).
        features: The extractor of every comparison.
    """

    def __init__(self, images: Pixels, features: Extractor) -> None:
        self.images = images
        self.extractor = features
        self.features = features(images)


def sample_metrics(
    real: Pixels | Reference,
    generated: Pixels,
    features: Extractor,
    *,
    seed: int,
    only: Collection[str] | None = None,
) -> dict[str, float]:
    """Every metric of the table that is defined for these sets.

    Args:
        real: uint8 (N, C, H, W), or their `Reference` with the same extractor.
        generated: uint8 (M, C, H, W).
        features: The extractor.
        seed: Of the order in which sets are cut into parts, and of the directions.
        only: Plain names (`kid`); default all. A name that is not defined is then an error.

    Returns:
        Full name (`kid[vd-1a2b3c4d]`) to value, in the table's order.

    Raises:
        UserError: `only` names an unknown metric, or one that `undefined` explains.
    """
    known = real if isinstance(real, Reference) else Reference(real, features)
    assert known.extractor.sha256 == features.sha256, "the reference has another extractor"
    assert known.images.shape[1:] == generated.shape[1:], f"{known.images.shape} and {generated.shape}"
    made = features(generated)
    count, size = made.values.shape
    missing = undefined_metrics(len(known.images), count, size, classes=made.logits is not None)
    asked = set(SAMPLE_METRICS) if only is None else set(only)
    for name in sorted(asked):
        if name not in SAMPLE_METRICS:
            raise UserError(f"there is no sample metric {name!r}{did_you_mean(name, SAMPLE_METRICS)}")
        if name in missing and only is not None:
            raise UserError(missing[name])
    asked -= missing.keys()
    x, y = (_double(one.values) for one in (known.features, made))
    label, found = features.label, dict[str, float]()

    def add(**values: float) -> None:
        found.update({f"{name}[{label}]": value for name, value in values.items()})

    if "kid" in asked:
        value, error = kid(x, y, seed=seed)
        add(kid=value, kid_error=error)
    if "frechet" in asked:
        add(frechet=frechet(x, y))
    if "frechet_extrapolated" in asked:
        add(frechet_extrapolated=frechet_extrapolated(x, y, seed=seed))
    if asked & {"precision", "recall", "density", "coverage"}:
        values = neighbourhoods(x, y)
        add(**{name: value for name, value in values.items() if name in asked})
    if "sliced_wasserstein" in asked:
        add(sliced_wasserstein=sliced_wasserstein(x, y, seed=seed))
        found[PIXELS] = sliced_wasserstein(_flat(known.images), _flat(generated), seed=seed)
    if "inception_score" in asked and made.logits is not None:
        add(inception_score=inception_score(made.logits))
    return found


def undefined_metrics(real: int, generated: int, size: int, *, classes: bool) -> dict[str, str]:
    """Plain name to a sentence with the reason, for the metrics that sets of so many images do not have.

    Args:
        real, generated: Numbers of images.
        size: D, number of features.
        classes: Whether the extractor has logits.
    """
    told: dict[str, str] = {}
    fewest = min(real, generated)

    def need(least: int, *names: str) -> None:
        if fewest < least:
            told.update(
                {
                    name: f"{name} is not defined, because it needs at least {least} real and {least} generated "
                    f"images, and there are {real} and {generated}"
                    for name in names
                }
            )

    need(1, "sliced_wasserstein")
    need(2, "frechet")
    need(4, "kid")
    need(NEIGHBOURS + 1, "precision", "recall", "density", "coverage")
    need(4 * size, "frechet_extrapolated")
    if not classes:
        told["inception_score"] = "inception_score is not defined, because the extractor has no class logits"
    return told


def base_name(name: str) -> str:
    """`kid` of `kid[vd-1a2b3c4d]`: what a job's `monitor.metric` may say."""
    return name.partition("[")[0]


def is_sample_metric(name: str) -> bool:
    """Whether `name`, plain or full, is one that a job may monitor."""
    return base_name(name) in SAMPLE_METRICS


def monitored_value(found: Mapping[str, float], name: str) -> float:
    """The value that a monitor's `name` means: by its full name, else the extractor's one of that plain name.

    Raises:
        UserError: there is none, or its full name is of another extractor.
    """
    if name in found:
        return found[name]
    for full, value in found.items():
        if full != PIXELS and base_name(full) == name:
            return value
    raise UserError(
        f"there is no sample metric {name!r} here{did_you_mean(name, [*found, *map(base_name, found)])}"
    )


# The metrics, of features (N, D) and (M, D) in float64 -----------------------------------------------------------


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
    rng = _generator(seed)
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


def frechet(x: Matrix, y: Matrix) -> float:
    """|m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)), with the unbiased covariances S; at least 2 rows each.

    tr (S_x S_y)^(1/2) is the sum of the singular values of R_x R_y^T, where S = R^T R and R is the triangle of
    the QR decomposition of the centred features: no square root of a matrix, and no trouble where S is singular.
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


_MOST_PARTS = 4


def frechet_extrapolated(x: Matrix, y: Matrix, *, seed: int) -> float:
    """The Frechet distance at 1/n = 0, on the least-squares line through its values at n = N, N/2, N/3, N/4.

    N is the smaller count; each value is the mean over the disjoint parts of that size. Sizes below 2 D, where the
    bias no longer falls as 1/n, are left out; N must be at least 4 D.
    """
    rng = _generator(seed)
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


def neighbourhoods(x: Matrix, y: Matrix, k: int = NEIGHBOURS) -> dict[str, float]:
    """`precision`, `recall`, `density`, `coverage` of generated `y` against real `x`; more than k rows each.

    A ball reaches from an image to its k-th nearest neighbour in its own set, itself not counted, bound included.
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
        yield (
            slice(start, start + len(part)),
            np.maximum((part**2).sum(1)[:, None] - 2 * part @ y.T + squares, 0),
        )


def sliced_wasserstein(x: NDArray[Any], y: NDArray[Any], *, seed: int, directions: int = DIRECTIONS) -> float:
    """Root mean square of W_2 of the projections on `directions` random unit vectors; (N, D) and (M, D).

    In one dimension W_2^2 = int (F_x^-1(u) - F_y^-1(u))^2 du, exactly, for any two counts. A shift of everything by v
    gives about |v| / sqrt(D): for pixels, the root mean square shift of a pixel.
    """
    rng = _generator(seed)
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


def inception_score(logits: NDArray[np.float32]) -> float:
    """exp(mean KL(p(y | x) || p(y))) with p(y) the mean of p(y | x) over all images; (N, K) logits."""
    shifted = _double(logits) - logits.max(1, keepdims=True)
    log_given = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    given = np.exp(log_given)
    log_whole = np.log(np.maximum(given.mean(0), 1e-300))
    return float(np.exp((given * (log_given - log_whole)).sum(1).mean()))


def _double(values: NDArray[Any]) -> Matrix:
    return values.astype(np.float64)


def _flat(images: Pixels) -> NDArray[np.float32]:
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))
