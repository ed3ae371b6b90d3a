"""One pass of a model over a split: every number per image, then means, spread and groups.

A reconstruction is rounded to uint8 before it is measured: what is scored is what the picture file would hold.
Values are kept per image in float64 and summed exactly, so they depend on the batch size and the order of the images
in their last bits only. (A statistic of a whole batch, which a variant may report, does depend on the batch size and
is listed apart.)

What a variant cannot do follows from its declared capabilities, never from its name; the reason is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaedist.core.context import Batch, SampleContext
from vaedist.core.errors import UserError
from vaedist.core.imaging import Pixels, as_numpy, to_uint8
from vaedist.evaluation.metrics.baselines import Baselines
from vaedist.evaluation.metrics.codebook_usage import CodeCounter
from vaedist.evaluation.metrics.image_quality import batch_metrics, summaries, too_small
from vaedist.models.contract import Variant


@dataclass(frozen=True)
class ImageMetrics:
    """One image: its metrics against its reconstruction, the model's terms, and the baselines' metrics."""

    sample: int
    key: str
    label: int
    metrics: dict[str, float]
    terms: dict[str, float]
    baselines: dict[str, dict[str, float]]


@dataclass
class SplitMetrics:
    """The numbers of one pass."""

    rows: list[ImageMetrics] = field(default_factory=list)
    units: dict[str, str] = field(default_factory=dict)
    """Term to unit, where the model declares one."""
    batch_terms: dict[str, float] = field(default_factory=dict)
    """Statistics of whole batches, averaged over batches by their rows; they depend on the batch size."""
    codes: dict[str, float | int] | None = None
    code_counts: NDArray[np.int64] | None = None
    """(K,) how often each code occurs in the split."""
    not_defined: dict[str, str] = field(default_factory=dict)
    """Operation or metric to a sentence with the reason."""

    def baselines(self) -> dict[str, dict[str, Any]]:
        """Baseline to metric to mean, std, count; empty where none were asked for."""
        names = list(self.rows[0].baselines) if self.rows else []
        return {name: summaries(row.baselines[name] for row in self.rows) for name in names}

    def by(self, group_of: Callable[[ImageMetrics], str | None]) -> dict[str, dict[str, Any]]:
        """`summarize_images` of each group, in sorted order; rows for which `group_of` gives None are in no group."""
        members: dict[str, list[ImageMetrics]] = {}
        for row in self.rows:
            name = group_of(row)
            if name is not None:
                members.setdefault(name, []).append(row)
        return {name: summarize_images(members[name]) for name in sorted(members)}

    def document(self) -> dict[str, Any]:
        """Everything but the single rows, as JSON values."""
        return {
            **summarize_images(self.rows),
            "units": {**self.units, **({"elbo": "nats"} if "elbo" in self.rows[0].terms else {})},
            "batch_terms": self.batch_terms,
            "codes": self.codes,
            "baselines": self.baselines(),
            "not_defined": self.not_defined,
        }

    def lines(self) -> Iterator[dict[str, Any]]:
        """One JSON object per image; null where a value is not defined."""

        def as_json(values: dict[str, float]) -> dict[str, float | None]:
            return {name: value if math.isfinite(value) else None for name, value in values.items()}

        for row in self.rows:
            yield {
                "key": row.key,
                "label": row.label,
                "metrics": as_json(row.metrics),
                "terms": as_json(row.terms),
                "baselines": {name: as_json(values) for name, values in row.baselines.items()},
            }


def summarize_images(rows: Sequence[ImageMetrics]) -> dict[str, Any]:
    """`images`, and `metrics` and `terms` as name to mean, std, count, of some rows."""
    return {
        "images": len(rows),
        "metrics": summaries(row.metrics for row in rows),
        "terms": summaries(row.terms for row in rows),
    }


@torch.no_grad()
def evaluate_images(
    model: Variant,
    batches: Iterable[Batch],
    *,
    seed: int = 0,
    step: int = 0,
    baselines: Baselines | None = None,
    progress: Callable[[int], None] | None = None,
) -> SplitMetrics:
    """Measure `model` on every image of `batches`, each once.

    Args:
        model: In evaluation mode, with the weights to judge, on the device of the batches.
        batches: With `image`, `label`, `key`, `sample`; rows where `mask` is False are left out.
        seed: Of the noise that stochastic terms draw: per (seed, sample), so no batch size enters.
        step: Step of the weights; never part of the noise.
        baselines: Scored on the same images, in the same way.
        progress: Called with the number of images done.

    Raises:
        UserError: there is no image, or a reconstruction is not finite.
    """
    found = SplitMetrics(units=dict(model.units))
    counter = CodeCounter(model.num_codes) if model.latent == "codes" else None
    if counter is None:
        found.not_defined["codes"] = str(model.not_defined("codes"))
    if not model.reconstructs:
        found.not_defined["reconstruct"] = str(model.not_defined("reconstruct"))
    batch_terms: dict[str, list[float]] = {}
    for batch in images_of(batches, progress):
        count = len(batch["sample"])
        if not found.rows and model.reconstructs:
            found.not_defined.update(too_small(*batch["image"].shape[-2:]))
        batch = with_codes(model, batch)
        originals = clean(batch)

        def measured(pictures: Pixels, originals: Tensor = originals) -> list[dict[str, float]]:
            return batch_metrics(originals, torch.tensor(pictures, device=originals.device))

        metrics: list[dict[str, float]] = [{} for _ in range(count)]
        if model.reconstructs:
            metrics = measured(reconstruct(model, batch))
        others: list[dict[str, dict[str, float]]] = [{} for _ in range(count)]
        if baselines is not None:
            for name, pictures in baselines.reconstruct(to_uint8(batch["image"])).items():
                for row, values in zip(others, measured(pictures), strict=True):
                    row[name] = values
        if counter is not None:
            counter.add(batch["codes"])
        terms, per_batch = _terms(model, batch, seed, step)
        for name, value in per_batch.items():
            batch_terms.setdefault(name, []).append(value * count)
        columns = (batch["sample"], batch["key"], batch["label"].tolist(), metrics, terms, others)
        found.rows += [ImageMetrics(*row) for row in zip(*columns, strict=True)]
    if not found.rows:
        raise UserError("there is no image to evaluate: the split is empty")
    if counter is not None:
        found.codes, found.code_counts = counter.result(), counter.counts
    found.batch_terms = {name: math.fsum(sums) / len(found.rows) for name, sums in batch_terms.items()}
    return found


def reconstruct(model: Variant, batch: Batch) -> Pixels:
    """uint8 (B, C, H, W): the model's reconstructions as a picture file would hold them.

    Raises:
        NotDefined: the variant does not reconstruct.
        UserError: a reconstruction holds NaN or infinity; the first such key is named.
    """
    pictures = as_numpy(model.reconstruct(batch["image"], batch.get("label") if model.conditional else None))
    check_finite("reconstruction", batch, np.isfinite(pictures).reshape(len(pictures), -1).all(axis=1))
    return to_uint8(pictures)


def check_finite(what: str, batch: Batch, finite: Any) -> None:
    """Refuse numbers that are not finite.

    Args:
        what: Is measured.
        batch: Of which images.
        finite: (B,) bool.

    Raises:
        UserError: naming the first such image.
    """
    if not finite.all():
        raise UserError(
            f"the {what} of {batch['key'][int(as_numpy(finite).argmin())]} is not finite: the weights are damaged or "
            "training diverged; evaluate an earlier checkpoint"
        )


def _terms(
    model: Variant, batch: Batch, seed: int, step: int
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Terms per row, and those that are one number per batch; with several phases a term is `term/phase`."""
    count = len(batch["sample"])
    rows: list[dict[str, float]] = [{} for _ in range(count)]
    scalars: dict[str, float] = {}
    for phase in model.phases:
        ctx = SampleContext(seed=seed, samples=batch["sample"], step=step, device=batch["image"].device)
        ctx.phase = phase
        suffix = "" if len(model.phases) == 1 else f"/{phase}"
        terms = model(batch, ctx)
        for name, value in terms.items():
            numbers = value.double().tolist()
            if value.dim() == 0:
                scalars[f"{name}{suffix}"] = numbers
                continue
            for row, number in zip(rows, numbers, strict=True):
                row[f"{name}{suffix}"] = number
        if {"distortion", "rate"} <= terms.keys():
            # The evidence bound itself; `loss` differs from its negative wherever the rate has a weight.
            for row in rows:
                row[f"elbo{suffix}"] = -(row[f"distortion{suffix}"] + row[f"rate{suffix}"])
    return rows, scalars


def clean(batch: Batch) -> Tensor:
    """uint8 (B, C, H, W): what a reconstruction should be, which a denoiser is not shown."""
    return batch.get("target", batch["image"])


def with_codes(model: Variant, batch: Batch) -> Batch:
    """The batch, with the codes of its images where the model has them."""
    if model.latent != "codes" or "codes" in batch:
        return batch
    return {**batch, "codes": model.codes(batch["image"])}


def images_of(batches: Iterable[Batch], progress: Callable[[int], None] | None = None) -> Iterator[Batch]:
    """Each batch without the rows that only pad it, where any remain; `progress` gets the number of images done."""
    done = 0
    for batch in map(without_padding, batches):
        if batch["sample"]:
            yield batch
            done += len(batch["sample"])
            if progress is not None:
                progress(done)


def without_padding(batch: Batch) -> Batch:
    """The rows of a batch that are samples, in their order."""
    mask = batch.get("mask")
    if mask is None or bool(mask.all()):
        return batch
    kept = mask.nonzero().flatten()
    rows = {
        name: value[kept] if isinstance(value, Tensor) else [value[i] for i in kept.tolist()]  # type: ignore[index]
        for name, value in batch.items()
        if name != "mask"
    }
    return cast(Batch, rows)


def pick_evenly(rows: Sequence[ImageMetrics], count: int) -> list[ImageMetrics]:
    """Up to `count` rows spread evenly over the sorted quality, the worst first and the best last.

    Quality is the SSIM, or the negative MSE of images too small for one.
    """

    def quality(row: ImageMetrics) -> float:
        known = (row.metrics["ssim"], row.metrics["ssim_default"], -row.metrics["mse"])
        return next(value for value in known if math.isfinite(value))

    ranked = sorted(rows, key=quality)
    if len(ranked) <= count:
        return ranked
    return [ranked[rank] for rank in np.linspace(0, len(ranked) - 1, count).round().astype(int)]


@torch.no_grad()
def pairs(model: Variant, batches: Iterable[Batch], samples: Sequence[int]) -> tuple[Pixels, Pixels]:
    """Originals and reconstructions, uint8 (n, C, H, W) each, of the given sample numbers, in their order.

    A second pass that runs the model on the chosen images alone: memory does not grow with the split.
    """
    wanted = set(samples)
    found: dict[int, tuple[Pixels, Pixels]] = {}
    for batch in map(without_padding, batches):
        mask = torch.tensor([sample in wanted for sample in batch["sample"]], device=batch["image"].device)
        chosen = without_padding(Batch(**{**batch, "mask": mask}))
        if chosen["sample"]:
            both = zip(to_uint8(clean(chosen)), reconstruct(model, chosen), strict=True)
            found.update(zip(chosen["sample"], both, strict=True))
        if len(found) == len(wanted):
            break
    originals, others = zip(*(found[sample] for sample in samples), strict=True)
    return np.stack(originals), np.stack(others)


def training_images(batches: Iterable[Batch], every: int = 1) -> Pixels:
    """uint8 (N, C, H, W): every n-th image of a split, what the baselines are fitted on."""
    parts = []
    for batch in map(without_padding, batches):
        rows = [row for row, sample in enumerate(batch["sample"]) if sample % every == 0]
        if rows:
            parts.append(to_uint8(clean(batch))[rows])
    return np.concatenate(parts)
