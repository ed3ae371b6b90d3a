"""The latents of a split: a map of the images, what each latent number carries, and ways through the latents."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from vaedist.core.errors import NotDefined
from vaedist.data.format.index import Index
from vaedist.evaluation.evaluate_run import EvaluationResult
from vaedist.evaluation.html_report import charts
from vaedist.evaluation.html_report.content import Section
from vaedist.evaluation.metrics.latents import Latents, collect_latents
from vaedist.inference.latent_space import interpolation
from vaedist.models.contract import Variant

STRIPS, FRAMES = 4, 9
MOST_POINTS = 4000
"""Images on the map of the latents."""
FEWEST_FOR_UMAP = 32
"""Two neighborhoods of 15; below 4 images it fails."""


def latent_section(result: EvaluationResult, document: Mapping[str, Any]) -> Section:
    """Empty for a model without latent numbers."""
    section = Section("Latents")
    model, index, latents = result.run.model, result.index, result.posteriors
    if model.latent not in ("vector", "map"):
        return section
    if latents is None:  # not measured: --importance 0
        try:
            latents = collect_latents(model, result.batches, seed=result.run.job.seed)
        except NotDefined:
            return section
    latents = latents.every(max(1, -(-len(latents.keys) // MOST_POINTS)))
    flat = latents.mean.double().numpy()
    if min(flat.shape) >= 2:
        points, (x, y, name) = _plane(flat)
        groups = _groups(latents, index, document["data"]["split"])
        section.charts.append(charts.scatter(points, groups, x=x, y=y))
        section.note = (
            f"Each point is one image of the split, at the mean of its posterior ({name}), coloured by "
            f"{'class' if len(index.classes) > 1 else 'subject'}."
        )
    if latents.log_variance is not None:
        kl = sorted(latents.kl().tolist(), reverse=True)
        section.charts.append(charts.bars(kl, x="latent numbers, the most used first", y="KL, nats"))
    _add_strips(section, model, latents)
    return section


def _plane(flat: Any) -> tuple[Any, tuple[str, str, str]]:
    """(N, 2), and what the two axes and the map are called."""
    if len(flat) >= FEWEST_FOR_UMAP:
        with contextlib.suppress(ImportError):
            from umap import UMAP  # type: ignore[import-not-found]  # used where a person has installed it

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # points far from all others; they are drawn, too
                fitted = UMAP(random_state=0, n_jobs=1).fit_transform(flat)
            return fitted, ("UMAP 1", "UMAP 2", "UMAP")
    from sklearn.decomposition import PCA

    principal = PCA(2, svd_solver="full").fit(flat)
    first, second = principal.explained_variance_ratio_
    axes = f"axis 1, {first:.0%} of the variance", f"axis 2, {second:.0%}", "principal axes"
    return principal.transform(flat), axes


def _groups(latents: Latents, index: Index, name: str) -> list[str]:
    """The class of each image; where there is but one, its subject."""
    if len(index.classes) > 1:
        return [index.classes[label] if label >= 0 else "unlabelled" for label in latents.labels.tolist()]
    split = index.split(name)
    subjects = {split.key(number): split.subject(number) for number in range(split.count)}
    return [subjects.get(key) or "all" for key in latents.keys]


def _add_strips(section: Section, model: Variant, latents: Latents) -> None:
    """From one image of the split to another through the latents."""
    count = min(2 * STRIPS, len(latents.keys) // 2 * 2)
    if count < 2:
        return
    chosen = np.linspace(0, len(latents.keys) - 1, count).round().astype(int).tolist()
    weight = next(model.parameters())
    strips = []
    for pair in zip(chosen[::2], chosen[1::2], strict=True):
        a, b = (latents.mean[row].reshape(latents.shape).to(weight.device, weight.dtype) for row in pair)
        label = int(latents.labels[pair[0]]) if model.conditional else None
        with torch.no_grad():
            strips.append(interpolation(model, a, b, FRAMES, label))
    caption = f"{len(strips)} ways from one image of the split (left) to another (right) through the latents"
    section.add_grid(caption, np.concatenate(strips), FRAMES)
