"""Everything that is measured of one run on one split, each part by what the model can do.

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
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from vaedist.core.errors import NotDefined, UserError
from vaedist.core.imaging import Pixels
from vaedist.core.terminal import StartBar
from vaedist.data.format.index import Index
from vaedist.data.loading.inputs import EvaluationInputs, whole_split
from vaedist.evaluation import sample_quality
from vaedist.evaluation.groups import metrics_by_group
from vaedist.evaluation.memorization import audit
from vaedist.evaluation.memorization_figure import memorization_figure
from vaedist.evaluation.metrics.baselines import Baselines, latent_size
from vaedist.evaluation.metrics.code_priors import TokenBaselines, measure_prior, training_codes
from vaedist.evaluation.metrics.features import Extractor
from vaedist.evaluation.metrics.latents import Latents, collect_latents, latent_statistics
from vaedist.evaluation.metrics.likelihood import DRAWS, measure_likelihood
from vaedist.evaluation.metrics.per_image import SplitMetrics, evaluate_images, training_images
from vaedist.inference.stored_mixture import load_or_fit_mixture
from vaedist.runs.open_run import Run

TRAINING_BYTES = 2 << 30
"""Most memory for training images held at once; of a larger set, every n-th image."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured, of which weights, and on which images: the options of `vaedist-evaluate`."""

    split: str | None = None
    """None: `test`; where the data have none, `validate`."""
    limit: int | None = None
    """Only the first images of the split."""
    data: str | None = None
    """The packed folder; None: where the run read it."""
    other_data: bool = False
    """Allow data that the run was not trained from."""
    weights: Literal["ema", "raw"] | None = None
    """None: what the job says."""
    device: str = "auto"
    baselines: bool = True
    importance: int = DRAWS
    """Importance samples of each image; 0: no likelihood and no split of the rate."""
    rounds: int = 1
    chunk: int | None = None
    samples: int = 0
    """Images to draw; 0: no sample quality."""
    sampler: Literal["prior", "gmm"] = "prior"
    features: str | None = None
    """A TorchScript file as the extractor of sample quality; None: our own."""
    audit: bool = False
    """Compare those samples with the training images."""
    groups: str | None = None
    """A file of groups: see `vaedist.evaluation.groups`."""


@dataclass
class EvaluationResult:
    """What was measured of `run` on a split of `index`."""

    run: Run
    index: Index
    split: str
    batches: EvaluationInputs
    """The split, as the model is shown it."""
    images: SplitMetrics
    parts: dict[str, Any] = field(default_factory=dict)
    """`likelihood`, `latents`, `prior`, `samples`, `audit` as JSON values, where measured."""
    not_defined: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    """File name to PNG file."""
    posteriors: Latents | None = None
    """What the numbers of `latents` were taken from."""

    def document(self, groups: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
        """The content of `metrics.json`.

        Args:
            groups: Of `read_groups`.

        Raises:
            UserError: no image is in any group of a column.
        """
        run, index, split = self.run, self.index, self.index.split(self.split)
        found = {**self.images.document(), **self.parts}
        for part in self.parts.values():
            found["not_defined"] |= part.get("not_defined", {})
        found["not_defined"] |= self.not_defined
        return {
            "format": 1,
            "run": str(run.folder),
            "checkpoint": run.checkpoint.name,
            "step": run.step,
            "weights": run.weights,
            "kind": run.job.kind,
            "tokenizer": run.job.model.tokenizer.sha256 if run.model.reads == "codes" else None,  # type: ignore[attr-defined]
            "data": {
                "path": str(index.folder),
                "identity": index.identity,
                "other_data": index.identity != run.data_identity,
                "split": self.split,
                "split_images": split.count,
                "shape": list(index.shape),
                "binarise": self.batches.inputs.binarization,
            },
            "collapse": run.collapse.to_json() if run.collapse else None,
            "torch": torch.__version__,
            **found,
            "groups": metrics_by_group(self.images, split, index.classes, groups),
        }


class TrainingSplit:
    """The training split: what baselines, counts and the memorization audit are fitted on.

    Attributes:
        batches: All of it, as the model is shown it.
        split: Where keys and subjects stand.
    """

    def __init__(self, run: Run, index: Index) -> None:
        name = run.job.data.train_split
        self.batches, self.split = whole_split(index, name, run.job, device=_device(run)), index.split(name)
        self._every = max(1, -(-self.batches.count * run.spec.pixels // TRAINING_BYTES))

    @functools.cached_property
    def images(self) -> Pixels:
        """uint8 (N, C, H, W), read once: all, or every n-th where they would not fit in memory."""
        if self._every > 1:
            print(
                f"every {self._every}th of the {self.batches.count} training images is used, to fit in memory"
            )
        return training_images(self.batches, self._every)

    def names(self) -> tuple[list[str], list[str] | None]:
        """Key and subject of each of `images`; no subjects where the source does not name them."""
        numbers = range(0, self.batches.count, self._every)
        subjects = [self.split.subject(number) for number in numbers]
        return [self.split.key(number) for number in numbers], subjects if all(subjects) else None


def evaluate(
    run: Run, index: Index, config: EvaluationConfig, *, bar: StartBar, features: Extractor | None = None
) -> EvaluationResult:
    """Measure everything that `config` asks for and that is defined for the model of `run`.

    Args:
        run: Opened on the device that is to be used.
        index: The data to measure on.
        config: What to measure; its `weights`, `data` and `device` were used to open `run` and `index`.
        bar: Starts a progress bar.
        features: The extractor of sample quality; needed where `config.samples` is not 0.

    Raises:
        UserError: the split is empty or not there, or a number is not finite.
    """
    model, seed, step = run.model, run.job.seed, run.step
    split = config.split or _default_split(index)
    if config.audit and split == run.job.data.train_split:
        raise UserError(
            f"--audit measures by held-out images, and {run.folder} was trained on {split!r}: choose another --split"
        )
    batches = whole_split(index, split, run.job, device=_device(run), limit=config.limit)
    training = TrainingSplit(run, index)
    fitted = None
    if config.baselines and model.reconstructs:
        fitted = Baselines(training.images, latent_size(model))
    progress = bar("evaluate", batches.count)
    images = evaluate_images(model, batches, seed=seed, step=step, baselines=fitted, progress=progress)
    result = EvaluationResult(run, index, split, batches, images)

    def likelihood() -> dict[str, Any]:
        return measure_likelihood(
            model,
            batches,
            draws=config.importance,
            rounds=config.rounds,
            seed=seed,
            chunk=config.chunk,
            progress=bar("likelihood", batches.count),
        ).document()

    def latents() -> dict[str, Any]:
        result.posteriors = collect_latents(model, batches, seed=seed, progress=bar("latents", batches.count))
        return latent_statistics(result.posteriors, seed=seed, classes=model.conditional)

    counts: TokenBaselines | None = None
    parts: dict[str, Callable[[], dict[str, Any]]] = {}
    if model.reads == "codes":
        counts = TokenBaselines(training_codes(model, training.batches), model.num_codes)
        progress = bar("codes", batches.count)
        parts["prior"] = lambda: measure_prior(
            model, batches, counts, seed=seed, step=step, progress=progress
        ).document()
    elif config.importance:
        parts |= {"likelihood": likelihood, "latents": latents}
    if config.samples:
        parts["samples"] = lambda: _samples(result, training, counts, config, features, bar)
    for name, measure in parts.items():
        try:
            result.parts[name] = measure()
        except NotDefined as error:
            result.not_defined[name] = str(error)
    return result


def _samples(
    result: EvaluationResult,
    training: TrainingSplit,
    counts: TokenBaselines | None,
    config: EvaluationConfig,
    features: Extractor | None,
    bar: StartBar,
) -> dict[str, Any]:
    """Sample quality, and the audit of the same samples."""
    assert features is not None
    run, model, count = result.run, result.run.model, config.samples
    if not model.samples:
        raise model.not_defined("sample")
    real = training_images(result.batches)
    mixture = load_or_fit_mixture(run, lambda: result.index, bar) if config.sampler == "gmm" else None
    labels = None
    if model.conditional:
        # As often as they are among the training images: drawn evenly, as by default, samples of rare classes would be
        # measured as a deviation from the real set, which has few of them.
        labels = [training.split.label(row) for row in _evenly_spaced(training.split.count, count)]
    drawn = sample_quality.draw_samples(
        model, count, mixture=mixture, labels=labels, progress=bar("samples", count)
    )
    if config.audit:
        keys, subjects = training.names()
        found = audit(drawn, training.images, real, features, groups=subjects, keys=keys)
        result.parts["audit"] = found.document()
        result.pictures["memorisation.png"] = memorization_figure(found, drawn, training.images)
    sets = {"this run": drawn}
    if counts is not None:
        sets[sample_quality.POSITIONS] = sample_quality.draw_per_position(model, counts, count)
    images = training.images
    sets[sample_quality.TRAINING] = images[_evenly_spaced(len(images), min(count, len(images)))]
    latents_from = sample_quality.PRIOR if mixture is None else str(mixture)
    return {"latents_from": latents_from, **sample_quality.compare_samples(real, sets, features)}


def _evenly_spaced(total: int, count: int) -> list[int]:
    """`count` numbers from 0 to total - 1, as even as can be."""
    return [round(number) for number in np.linspace(0, total - 1, count).tolist()]


def _device(run: Run) -> torch.device:
    return next(run.model.parameters()).device


def _default_split(index: Index) -> str:
    """The split that is measured. Own images often come without a test split; this is said wherever it matters."""
    if "test" in index.splits or "validate" not in index.splits:
        return "test"
    print(
        f"note: {index.folder} has no test split (vaedist-shard --test-fraction 0.1 holds one apart): measured on "
        "validate, by which the checkpoint was chosen, so the numbers are somewhat too good",
        file=sys.stderr,
    )
    return "validate"
