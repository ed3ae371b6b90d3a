"""Validation: every sample of a split once, with the final value of every loss weight.

Numbers are sums and counts, added in float64 and over ranks in rank order; rows that only pad the last batch
are masked. Noise belongs to the sample, so batch size and world size do not enter. What is kept to be looked at, a few
samples spread evenly over the split, is the same for every number of processes too.

A monitor may be a measure of sample quality instead of a term of the loss: rank 0 takes it, of as many generated images
as held-out ones, and sends it to the others, because a decision of the run must rest on the same number everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vaedist.config.job import Job
from vaedist.core.context import SampleContext
from vaedist.core.errors import NotDefined, UserError, did_you_mean
from vaedist.core.imaging import as_numpy, to_uint8
from vaedist.data.loading.inputs import EvaluationInputs
from vaedist.data.loading.order import slice_bounds
from vaedist.distributed.contexts import DistributedSampleContext
from vaedist.distributed.process_group import Group
from vaedist.evaluation.metrics.posterior_collapse import Usage, UsageCounter
from vaedist.evaluation.metrics.sample_metrics import (
    base_name,
    is_sample_metric,
    monitored_value,
    sample_metrics,
)
from vaedist.models.contract import Posterior, Variant
from vaedist.training.step import phase_suffix, precision

SHOWN = 8
"""Images for a picture."""
EMBEDDED = 512
"""Most latents for TensorBoard's projector, which draws each with a thumbnail."""
THUMBNAIL = 32
_WIDEST = 512
_AT_ONCE = 64


class ValidationSamples(NamedTuple):
    """What validation kept to be looked at; the same on every rank."""

    pictures: dict[str, Tensor]
    """`image`, `target` (where it differs) and `label` of up to 8 samples; empty where the model reads codes."""
    latents: dict[str, Tensor]
    """`mean` (N, D), `thumbnail` (N, C, h, w), `label` and `sample`; empty without a vector or map."""
    usage: Usage | None
    """Where the latent is a vector or a map."""


class SampleCollector:
    """Rows of chosen samples, gathered over ranks at the end."""

    def __init__(self, batches: EvaluationInputs, most: int) -> None:
        last = batches.first + batches.count - 1
        spread = np.linspace(batches.first, last, min(most, batches.count)).round()
        self._wanted = {int(sample) for sample in spread}
        self._rows: dict[str, list[Tensor]] = {}

    def places(self, samples: Sequence[int], mask: Tensor) -> list[int]:
        """Which rows of a batch are wanted."""
        real = mask.tolist()
        return [place for place, sample in enumerate(samples) if real[place] and sample in self._wanted]

    def add(self, **rows: Tensor) -> None:
        """Wanted rows of a batch, none included: a rank without any must still know their shape."""
        for name, value in rows.items():
            self._rows.setdefault(name, []).append(value)

    def gathered(self, group: Group) -> dict[str, Tensor]:
        """Of all ranks, in the order of their sample numbers; on every rank. Collective."""
        if not self._rows:
            return {}
        held = {name: torch.cat(rows) for name, rows in self._rows.items()}
        ctx = DistributedSampleContext(group, seed=0, samples=held["sample"].tolist())
        held = {name: ctx.gather(value) for name, value in held.items()}
        order = held["sample"].argsort()
        return {name: value[order] for name, value in held.items()}


@torch.no_grad()
def validate(
    model: Variant, batches: EvaluationInputs, job: Job, group: Group, step: int
) -> tuple[dict[str, float], ValidationSamples]:
    """Mean of every term over the split, and what there is to look at.

    With several phases each is evaluated, and a term is named `term/phase`. `active_units` is there where the latent is
    a vector or a map; measures of sample quality only where one of them is the monitor.
    """
    counter = UsageCounter()
    pictures, latents = SampleCollector(batches, SHOWN), SampleCollector(batches, EMBEDDED)
    held_out, judged = (
        SampleCollector(batches, job.train.monitor.images),
        is_sample_metric(job.train.monitor.metric),
    )
    sums: dict[str, Tensor] = {}
    count = torch.zeros((), dtype=torch.float64)
    model.eval()
    for batch in batches:
        mask, samples = batch["mask"], batch["sample"]
        count += float(mask.sum())
        ctx = DistributedSampleContext(
            group, seed=job.seed, samples=samples, step=step, batch_size=len(samples) * group.world
        )
        for phase in model.phases:
            ctx.phase = phase
            with precision(job, group.device):
                terms = model(batch, ctx)
            suffix = phase_suffix(model, phase)
            for name, value in terms.items():
                total = torch.where(mask, value.double(), 0.0).sum().cpu()
                sums[f"{name}{suffix}"] = sums.get(f"{name}{suffix}", 0.0) + total
        if "image" not in batch:
            continue

        # A few samples to look at; the encoder once more for what each latent unit says.
        numbers = torch.tensor(samples, device=mask.device)
        chosen = pictures.places(samples, mask)
        kept = {name: batch[name][chosen] for name in ("image", "target", "label") if name in batch}
        pictures.add(sample=numbers[chosen], **kept)
        clean = batch.get("target", batch["image"])
        posterior = _posterior(model, batch["image"], batch["label"], job, group)
        if posterior is not None:
            counter.add(posterior, mask)
            chosen = latents.places(samples, mask)
            latents.add(
                sample=numbers[chosen],
                label=batch["label"][chosen],
                mean=_vector(posterior.mean[chosen]),
                thumbnail=_thumbnail(clean[chosen]),
            )
        if judged:
            chosen = held_out.places(samples, mask)
            held_out.add(sample=numbers[chosen], image=clean[chosen])
    names = sorted(sums)
    everything = group.total(torch.stack([count, *(sums[name] for name in names)]))
    means = dict(zip(names, (everything[1:] / everything[0]).tolist(), strict=True))
    usage = counter.result(group) if counter.used else None
    if usage is not None:
        means["active_units"] = float(usage.active)
    if judged:
        means |= _sample_quality(model, held_out.gathered(group)["image"], job, group)
    return means, ValidationSamples(pictures.gathered(group), latents.gathered(group), usage)


def _posterior(model: Variant, image: Tensor, label: Tensor, job: Job, group: Group) -> Posterior | None:
    """q(z | x), where the variant has one over numbers: a generator without an encoder has not."""
    if model.latent not in ("vector", "map"):
        return None
    try:
        with precision(job, group.device):
            return model.encode(image, label if model.conditional else None)
    except NotDefined:
        return None


def _vector(mean: Tensor) -> Tensor:
    """(N, D) fp32; of a large map the mean of each channel, because the projector takes no more than a few hundred."""
    if mean.ndim > 2 and mean[0].numel() > _WIDEST:
        mean = mean.flatten(2).mean(2)
    return mean.flatten(1).float()


def _thumbnail(image: Tensor) -> Tensor:
    """uint8 (N, C, h, w), the longer side at most 32."""
    height, width = image.shape[2:]
    scale = THUMBNAIL / max(height, width)
    if scale >= 1:
        return image
    sides = (max(1, round(height * scale)), max(1, round(width * scale)))
    return functional.adaptive_avg_pool2d(image.float(), sides).round().to(torch.uint8)


def check_monitor(job: Job, model: Variant) -> None:
    """Refuse a monitor that this model can never be measured by.

    Raises:
        UserError: it is a measure of sample quality, and the model does not sample or sees no images; or a term of a
            game between two networks.
    """
    metric = job.train.monitor.metric
    if metric.partition("/")[0] in model.adversarial_terms:
        raise UserError(
            f"train.monitor.metric is {metric!r}, which tells which of this model's networks is ahead, not how good it "
            "is: name a measure of its samples, as in train.monitor.metric=kid"
        )
    if not is_sample_metric(metric):
        return
    if not model.samples:
        raise UserError(f"train.monitor.metric is {metric!r}, but {model.not_defined('sample')}")
    if model.reads == "codes":
        raise UserError(
            f"train.monitor.metric is {metric!r}, which compares images, but this model is validated on codes: "
            "monitor a term of its loss, such as loss"
        )


def check_monitored_term(job: Job, model: Variant, batches: EvaluationInputs) -> None:
    """Refuse a monitor that is no term of the model, by its terms on the first batch, before hours are trained for it.

    Each rank looks for itself. Every model has a loss, the default, so most runs compute nothing here.

    Raises:
        UserError: naming the terms that there are.
    """
    metric = job.train.monitor.metric
    if metric == "loss" or is_sample_metric(metric):
        return
    batch = next(iter(batches))
    samples = batch["sample"]
    ctx = SampleContext(seed=job.seed, samples=samples, device=batch["mask"].device)
    model.eval()
    known = {"active_units"} if model.latent in ("vector", "map") else set()
    for phase in model.phases:
        ctx.phase = phase
        with torch.no_grad(), precision(job, batch["mask"].device):
            terms = model(batch, ctx)
        known |= {name + phase_suffix(model, phase) for name in terms}
    if metric not in known:
        raise UserError(f"train.monitor.metric: unknown metric {metric!r}{did_you_mean(metric, known)}")


def _sample_quality(model: Variant, real: Tensor, job: Job, group: Group) -> dict[str, float]:
    """The monitored measure of as many generated images as real ones: every rank draws its share. Collective."""
    from vaedist.evaluation.metrics.features import default_extractor

    start, stop = slice_bounds(len(real), group.rank, group.world)
    drawn = [real[:0]]
    for first in range(start, stop, _AT_ONCE):
        images = model.sample(min(_AT_ONCE, stop - first), seed=job.seed, first=first)
        drawn.append(torch.from_numpy(to_uint8(images)).to(real.device))
    ctx = DistributedSampleContext(group, seed=job.seed, samples=range(start, stop))
    generated = ctx.gather(torch.cat(drawn))
    metric = job.train.monitor.metric

    def measure() -> bytes:
        found = sample_metrics(
            as_numpy(real),
            as_numpy(generated),
            default_extractor(group.device),
            seed=job.seed,
            only=[base_name(metric)],
        )
        return json.dumps({**found, metric: monitored_value(found, metric)}).encode()

    measured: dict[str, float] = json.loads(group.from_leader(measure))
    return measured
