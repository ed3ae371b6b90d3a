"""Everything that is measured of one model on one split, each part by what the model can do.

| part | asked of the model |
|---|---|
| terms, reconstructions, codes | `vaedist.evaluation.metrics.per_image`: always |
| likelihood | a posterior, a prior and a decoder over numbers |
| latents | a posterior and a prior over numbers |
| prior | `reads == "codes"` |
| samples, audit | `samples`, where they are asked for |

A part that is not defined leaves a sentence with the reason instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vaedist.core.context import Batch
from vaedist.core.errors import NotDefined
from vaedist.core.imaging import Pixels
from vaedist.core.terminal import StartBar
from vaedist.data.format.split import Split
from vaedist.evaluation import sample_quality as quality
from vaedist.evaluation.memorization import audit
from vaedist.evaluation.metrics import code_priors as tokens
from vaedist.evaluation.metrics import latents, likelihood
from vaedist.evaluation.metrics.baselines import Baselines, latent_size
from vaedist.evaluation.metrics.code_priors import TokenBaselines, training_codes
from vaedist.evaluation.metrics.features import Extractor
from vaedist.evaluation.metrics.per_image import SplitMetrics, evaluate_images, training_images
from vaedist.inference.mixture import Mixture
from vaedist.models.contract import Variant

TRAINING_BYTES = 2 << 30
"""Most memory for training images held at once; of a larger set, every n-th image."""


class Batches(Protocol):
    """A split's batches, in index order; can be iterated again."""

    count: int

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class EvaluationConfig:
    """What to measure beyond one pass over the split."""

    baselines: bool = True
    importance: int = likelihood.DRAWS
    """Importance samples of each image; 0: no likelihood and no split of the rate."""
    rounds: int = 1
    chunk: int | None = None
    samples: int = 0
    """Images to draw; 0: no sample quality."""
    features: Extractor | None = None
    """The extractor of sample quality; needed where `samples` is not 0."""
    audit: bool = False
    """Compare those samples with the training images."""
    mixture: Callable[[], Mixture] | None = None
    """Gives what the latents of samples come from; None: the prior."""


@dataclass
class EvaluationResult:
    """What was found."""

    evaluation: SplitMetrics
    parts: dict[str, Any] = field(default_factory=dict)
    """`likelihood`, `latents`, `prior`, `samples`, `audit` as JSON values, where measured."""
    not_defined: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    """File name to PNG file."""
    posteriors: latents.Latents | None = None
    """What the numbers of `latents` were taken from."""

    def document(self) -> dict[str, Any]:
        """JSON values."""
        found = {**self.evaluation.document(), **self.parts}
        for part in self.parts.values():
            found["not_defined"] |= part.get("not_defined", {})
        found["not_defined"] |= self.not_defined
        return found


class TrainingSplit:
    """The training split: what baselines, counts and the memorisation audit are fitted on.

    Args:
        batches: Of the whole split, as the model is shown it.
        split: Where keys and subjects stand.
        pixels: Values per image.
        tell: Shows one line.
    """

    def __init__(self, batches: Batches, split: Split, pixels: int, tell: Callable[[str], None]) -> None:
        self.batches, self.split = batches, split
        self._every = max(1, -(-batches.count * pixels // TRAINING_BYTES))
        self._tell = tell

    @functools.cached_property
    def images(self) -> Pixels:
        """uint8 (N, C, H, W), read once: all, or every n-th where they would not fit in memory."""
        if self._every > 1:
            count = self.batches.count
            self._tell(f"every {self._every}th of the {count} training images is used, to fit in memory")
        return training_images(self.batches, self._every)

    def names(self) -> tuple[list[str], list[str] | None]:
        """Key and subject of each of `images`; no subjects where the source does not tell them."""
        numbers = range(0, self.batches.count, self._every)
        subjects = [self.split.subject(number) for number in numbers]
        return [self.split.key(number) for number in numbers], subjects if all(subjects) else None


def evaluate(
    model: Variant,
    batches: Batches,
    training: TrainingSplit,
    wanted: EvaluationConfig,
    *,
    seed: int,
    step: int,
    bar: StartBar,
) -> EvaluationResult:
    """Measure everything `wanted` of `model` that is defined for it.

    Args:
        model: In evaluation mode, with the weights to judge, on the device of the batches.
        batches: The split to measure on, as the model is shown it.
        training: The training split, the same way.
        seed: The job's.
        step: Of the weights.
        bar: Shows progress.

    Raises:
        UserError: the split is empty, or a number is not finite.
    """
    fitted = None
    if wanted.baselines and model.reconstructs:
        fitted = Baselines(training.images, latent_size(model))
    found = EvaluationResult(
        evaluate_images(
            model, batches, seed=seed, step=step, baselines=fitted, progress=bar("evaluate", batches.count)
        )
    )

    def part(name: str, measure: Callable[[], dict[str, Any]]) -> None:
        try:
            found.parts[name] = measure()
        except NotDefined as error:
            found.not_defined[name] = str(error)

    counts: TokenBaselines | None = None
    if model.reads == "codes":
        counts = TokenBaselines(training_codes(model, training.batches), model.num_codes)
        progress = bar("codes", batches.count)
        part(
            "prior",
            lambda: tokens.measure_prior(
                model, batches, counts, seed=seed, step=step, progress=progress
            ).document(),
        )
    elif wanted.importance:
        part("likelihood", lambda: _likelihood(model, batches, wanted, seed, bar))
        part("latents", lambda: _latents(model, batches, seed, found, bar))
    if wanted.samples:
        part("samples", lambda: _samples(model, batches, training, counts, wanted, found, bar))
    return found


def _likelihood(
    model: Variant, batches: Batches, wanted: EvaluationConfig, seed: int, bar: StartBar
) -> dict[str, Any]:
    found = likelihood.measure_likelihood(
        model,
        batches,
        draws=wanted.importance,
        rounds=wanted.rounds,
        seed=seed,
        chunk=wanted.chunk,
        progress=bar("likelihood", batches.count),
    )
    return found.document()


def _latents(
    model: Variant, batches: Batches, seed: int, found: EvaluationResult, bar: StartBar
) -> dict[str, Any]:
    held = found.posteriors = latents.collect_latents(
        model, batches, seed=seed, progress=bar("latents", batches.count)
    )
    return latents.latent_statistics(held, seed=seed, classes=model.conditional)


def _samples(
    model: Variant,
    batches: Batches,
    training: TrainingSplit,
    counts: TokenBaselines | None,
    wanted: EvaluationConfig,
    found: EvaluationResult,
    bar: StartBar,
) -> dict[str, Any]:
    """Sample quality, and the audit of the same samples."""
    assert wanted.features is not None
    if not model.samples:
        raise model.not_defined("sample")
    real = training_images(batches)
    mixture, labels = wanted.mixture() if wanted.mixture else None, None
    if model.conditional:
        # As often as they are among the training images: drawn evenly, as by default, samples of rare classes would be
        # measured as a deviation from the real set, which has few of them.
        labels = [training.split.label(place) for place in _spread(training.split.count, wanted.samples)]
    made = quality.draw_samples(
        model, wanted.samples, mixture=mixture, labels=labels, progress=bar("samples", wanted.samples)
    )
    if wanted.audit:
        keys, subjects = training.names()
        told = audit(made, training.images, real, wanted.features, groups=subjects, keys=keys)
        found.parts["audit"] = told.document()
        found.pictures["memorisation.png"] = told.picture
    sets = {"this run": made}
    if counts is not None:
        sets[quality.POSITIONS] = quality.draw_per_position(model, counts, wanted.samples)
    images = training.images
    sets[quality.TRAINING] = images[_spread(len(images), min(wanted.samples, len(images)))]
    latents_from = quality.PRIOR if mixture is None else str(mixture)
    return {"latents_from": latents_from, **quality.compare_samples(real, sets, wanted.features)}


def _spread(total: int, count: int) -> list[int]:
    """`count` places from 0 to total - 1, as even as can be."""
    return [round(place) for place in np.linspace(0, total - 1, count).tolist()]
