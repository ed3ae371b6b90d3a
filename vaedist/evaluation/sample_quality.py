"""Generated images against real ones: a model's samples, and beside them what their numbers are worth.

Every number comes from `vaedist.evaluation.metrics.sample_metrics`, of images as picture files would hold them. Two
rows give the scale. `training images` are as many real ones of the training split: what a perfect model of the
training data would score on this split, whose patients it has not seen either. `per-position draws`, for a prior
over codes, decodes codes drawn at each position on its own: what the decoder alone makes of independent codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from vaedist.core.imaging import Pixels, to_uint8
from vaedist.evaluation.metrics.code_priors import TokenBaselines
from vaedist.evaluation.metrics.features import Extractor
from vaedist.evaluation.metrics.sample_metrics import Reference, sample_metrics, undefined_metrics
from vaedist.inference.mixture import Mixture
from vaedist.inference.sampling import SAMPLE_BATCH, Sampler
from vaedist.models.contract import Variant

PRIOR = "the prior"
TRAINING = "training images"
POSITIONS = "per-position draws"


def draw_samples(
    model: Variant,
    count: int,
    *,
    seed: int = 0,
    mixture: Mixture | None = None,
    labels: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Pixels:
    """uint8 (count, C, H, W) samples of the model; image i depends on (seed, i, its class) alone.

    Args:
        model: In evaluation mode.
        count: How many.
        seed: Of the noise.
        mixture: Where latents come from; None: the prior.
        labels: Class of each; None: no class is given.
        progress: Called with the number of images done.

    Raises:
        NotDefined: the model does not sample so.
        UserError: a sample is not finite.
    """
    sampler = Sampler(model, seed=seed, mixture=mixture)
    parts: list[Pixels] = []
    for first in range(0, count, SAMPLE_BATCH):
        last = min(first + SAMPLE_BATCH, count)
        parts.append(sampler.draw(last - first, first, None if labels is None else labels[first:last]).images)
        if progress is not None:
            progress(last)
    return np.concatenate(parts)


@torch.no_grad()
def draw_per_position(model: Variant, baselines: TokenBaselines, count: int, *, seed: int = 0) -> Pixels:
    """uint8 (count, C, H, W) decoded from codes drawn by position; of a model with `decode_codes`."""
    device = next(model.parameters()).device
    parts = []
    for first in range(0, count, SAMPLE_BATCH):
        codes = baselines.draw(min(SAMPLE_BATCH, count - first), seed=seed, first=first)
        decoded = model.decode_codes(torch.from_numpy(codes).to(device))
        parts.append(to_uint8(decoded.mean))
    return np.concatenate(parts)


def compare_samples(
    real: Pixels, sets: dict[str, Pixels], features: Extractor, *, seed: int = 0
) -> dict[str, Any]:
    """Every metric of each set of images against the real ones, as JSON values.

    Args:
        real: uint8 (N, C, H, W).
        sets: Name to uint8 (M, C, H, W); the first are the model's samples.
    """
    reference = Reference(real, features)
    first = next(iter(sets.values()))
    size, classes = reference.features.values.shape[1], reference.features.logits is not None
    return {
        "real": len(real),
        "generated": len(first),
        "extractor": {"name": features.label, "sha256": features.sha256, "features": size},
        "metrics": {
            name: sample_metrics(reference, made, features, seed=seed) for name, made in sets.items()
        },
        "not_defined": undefined_metrics(len(real), len(first), size, classes=classes),
    }
