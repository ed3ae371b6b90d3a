"""The share of samples below a level that other images set, its interval, and the largest share that chance gives.

Wilson: Probable inference, the law of succession, and statistical inference (1927).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vaedist.evaluation.metrics.nearest_neighbors import Distances

PERCENTILE = 0.01
_DRAWS = 20_000


@dataclass(frozen=True)
class Share:
    """A share of samples below a level set by other images."""

    share: float
    interval: tuple[float, float]
    """Wilson, 95 %, for the draw of samples."""
    level: float
    limit: float
    """The largest share that chance gives, 99 %."""

    @property
    def exceeds(self) -> bool:
        return self.share > self.limit

    def document(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "exceeds": self.exceeds}

    def __str__(self) -> str:
        return f"{self.share:.1%} ({self.interval[0]:.1%} to {self.interval[1]:.1%})"


def share_below(samples: Distances, natural: Distances, rng: np.random.Generator) -> Share:
    """The share of `samples` below the 1st percentile of `natural`.

    The percentile is the order statistic number 0.01 (m + 1), interpolated; the smallest value where m < 99.
    """
    count, others = len(samples), len(natural)
    level = float(np.quantile(natural, PERCENTILE, method="weibull"))
    below = int((samples < level).sum())
    limit = float(np.quantile(chance_shares(count, others, rng), 0.99))
    return Share(below / count, wilson_interval(below, count), level, limit)


def chance_shares(count: int, others: int, rng: np.random.Generator) -> Distances:
    """Draws of the share of `count` samples below the 1st percentile of `others` images of the same law."""
    order = max(1.0, PERCENTILE * (others + 1))
    return rng.binomial(count, rng.beta(order, others + 1 - order, _DRAWS)) / count


def wilson_interval(successes: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default."""
    share, z2 = successes / count, z * z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)
