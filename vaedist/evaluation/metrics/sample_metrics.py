"""How far generated images are from real ones, as distributions of features.

Every number is a function of two sets of images, taken through uint8, and of an extractor (`metrics.features`),
whose label is part of its name: `kid[vd-1a2b3c4d]`. Numbers compare where names, real set and counts are equal.

| name | what | better |
|---|---|---|
| `kid` | unbiased squared MMD, kernel (x.y / D + 1)^3: for equal laws 0 on average, so often below 0 | low |
| `kid_error` | its standard error: delete-a-group jackknife, images taken as independent | |
| `frechet` | squared Frechet distance of two Gaussians with the sets' moments; biased upwards | low |
| `frechet_extrapolated` | the same, extrapolated to infinitely many images; noisier, may be below 0 | low |
| `precision` | share of generated images within the k-th-neighbor ball of some real image (k = 5) | high |
| `recall` | share of real images within the ball of some generated image | high |
| `density` | how many real balls a generated image lies in, over k: about 1 for equal laws | high |
| `coverage` | share of real images whose ball holds a generated image | high |
| `sliced_wasserstein` | 2-Wasserstein distance of projections, root mean square over 256 fixed directions | low |
| `sliced_wasserstein[pixels]` | the same of the pixels in [0, 1], with no network at all | low |
| `inception_score` | exp of the mutual information of image and class, by the extractor's logits | high |

`frechet_extrapolated` wants at least four times as many images as features (512, from 128 pixels a side 1,024). The
KID has no bias and is what small sets are judged by. The Inception Score never looks at a real image, and its classes
are the extractor's (Salimans et al.: Improved techniques for training GANs, 2016).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vaedist.core.errors import UserError, did_you_mean
from vaedist.core.imaging import Pixels
from vaedist.evaluation.metrics.features import Extractor
from vaedist.evaluation.metrics.frechet_distance import frechet, frechet_extrapolated
from vaedist.evaluation.metrics.kid import kid
from vaedist.evaluation.metrics.precision_recall import NEIGHBORS, precision_recall
from vaedist.evaluation.metrics.sliced_wasserstein import sliced_wasserstein

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
    x, y = (one.values.astype(np.float64) for one in (known.features, made))
    found: dict[str, float] = {}
    if "kid" in asked:
        found["kid"], found["kid_error"] = kid(x, y, seed=seed)
    if "frechet" in asked:
        found["frechet"] = frechet(x, y)
    if "frechet_extrapolated" in asked:
        found["frechet_extrapolated"] = frechet_extrapolated(x, y, seed=seed)
    if asked & {"precision", "recall", "density", "coverage"}:
        found |= {name: value for name, value in precision_recall(x, y).items() if name in asked}
    if "sliced_wasserstein" in asked:
        found["sliced_wasserstein"] = sliced_wasserstein(x, y, seed=seed)
        found[PIXELS] = sliced_wasserstein(_flat(known.images), _flat(generated), seed=seed)
    if "inception_score" in asked and made.logits is not None:
        found["inception_score"] = inception_score(made.logits)
    return {name if name == PIXELS else f"{name}[{features.label}]": value for name, value in found.items()}


def inception_score(logits: NDArray[np.float32]) -> float:
    """exp(mean KL(p(y | x) || p(y))) with p(y) the mean of p(y | x) over all images; (N, K) logits."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    log_given = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    given = np.exp(log_given)
    log_whole = np.log(np.maximum(given.mean(0), 1e-300))
    return float(np.exp((given * (log_given - log_whole)).sum(1).mean()))


def _flat(images: Pixels) -> NDArray[np.float32]:
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)


def undefined_metrics(real: int, generated: int, size: int, *, classes: bool) -> dict[str, str]:
    """Plain name to a sentence with the reason, for the metrics that sets of so many images do not have.

    Args:
        real, generated: Numbers of images.
        size: D, number of features.
        classes: Whether the extractor has logits.
    """
    neighbors = dict.fromkeys(("precision", "recall", "density", "coverage"), NEIGHBORS + 1)
    least = {"sliced_wasserstein": 1, "frechet": 2, "kid": 4, **neighbors, "frechet_extrapolated": 4 * size}
    found = {
        name: f"{name} is not defined, because it needs at least {count} real and {count} generated images, and there "
        f"are {real} and {generated}"
        for name, count in least.items()
        if min(real, generated) < count
    }
    if not classes:
        found["inception_score"] = "inception_score is not defined, because the extractor has no class logits"
    return found


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
