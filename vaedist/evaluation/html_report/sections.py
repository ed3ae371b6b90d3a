"""The sections of one run's page, by what its model can do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import yaml

from vaedist.core.imaging import Pixels, as_numpy, channels_last, grid, png_bytes, to_uint8
from vaedist.data.format.index import Index
from vaedist.evaluation.evaluate_run import EvaluationResult
from vaedist.evaluation.html_report import charts
from vaedist.evaluation.html_report.content import HtmlTable, ImagePair, RunReport, Section, picture_uri
from vaedist.evaluation.html_report.latent_section import latent_section
from vaedist.evaluation.html_report.training_curves import training_curves
from vaedist.evaluation.metrics.per_image import ImageMetrics, pairs, pick_evenly, with_codes, without_padding
from vaedist.evaluation.metrics.tables import HEADS, digits, metrics_rows, sample_rows
from vaedist.evaluation.text_report import format_report
from vaedist.inference.sample_files import with_code_maps
from vaedist.inference.sampling import Sampler
from vaedist.inference.stored_mixture import load_mixture
from vaedist.runs.open_run import Run
from vaedist.runs.run_folder import RunFolder

PAIRS = 24
SAMPLES = 64
MAPS = 8


def run_report(result: EvaluationResult, document: Mapping[str, Any]) -> RunReport:
    """Everything that the page shows of a run.

    Args:
        result: Of `evaluate`.
        document: The content of its `metrics.json`.
    """
    run, data = result.run, document["data"]
    size = " x ".join(str(axis) for axis in data["shape"])
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    measured_on = (
        f"{document['images']:,} of {data['split_images']:,} images of {size}, split {data['split']}"
    )
    facts = [
        ("variant", f"{document['kind']}, {parameters:,} parameters"),
        ("weights", f"step {document['step']:,}, {document['weights']}, {document['checkpoint']}"),
        ("measured on", measured_on),
    ]
    sections = (
        _reconstructions(result, document),
        _samples(run, document),
        latent_section(result, document),
        _codes(result, document),
        _audit(result, document),
        training_curves(RunFolder(run.folder)),
        _data_card(result.index),
        _settings(run),
        Section("Every number", "As `vaedist-evaluate` prints it.", text=format_report(document)),
    )
    alarm = document["collapse"]["told"] if document["collapse"] else ""
    if data["other_data"]:
        alarm = f"These are not the data that the run was trained from. {alarm}".strip()
    about = f"{document['kind']} of {size} images"
    return RunReport(run.job.name, about, alarm, facts, [section for section in sections if section])


def _reconstructions(result: EvaluationResult, document: Mapping[str, Any]) -> Section:
    section, model = Section("Reconstructions"), result.run.model
    if not model.reconstructs:
        return section
    shown = pick_evenly(result.images.rows, PAIRS)
    originals, others = pairs(model, result.batches, [row.sample for row in shown])
    section.note = (
        f"{len(shown)} images from the worst reconstruction to the best, evenly over the split. The difference is the "
        "mean over channels, on one scale for all."
    )
    gaps = np.abs(originals.astype(np.float64) - others).mean(axis=1)
    pictures = (channels_last(originals), channels_last(others), map(_heat, gaps / (gaps.max() or 1.0)))
    for row, *three in zip(shown, *pictures, strict=True):
        section.pairs.append(ImagePair(row.key, _numbers(row), *map(picture_uri, three)))
    images = document["images"]
    measured = {"this run": document["metrics"], **document["baselines"]}
    note = "Mean ± standard deviation over images; foreground: where the original is above 0."
    rows = metrics_rows({name: (images, metrics) for name, metrics in measured.items()})
    section.tables.append(HtmlTable(rows, note))
    for name, members in document["groups"].items():
        values = {str(group): (part["images"], part["metrics"]) for group, part in members.items()}
        if len(values) > 1:
            section.tables.append(HtmlTable(metrics_rows(values, name)))
    return section


def _samples(run: Run, document: Mapping[str, Any]) -> Section:
    section, model = Section("Samples"), run.model
    samplers = {}
    if model.samples:
        samplers["from the prior, seed 0, none picked"] = Sampler(model)
    mixture = load_mixture(run) if model.latent in ("vector", "map") else None
    if mixture is not None and not model.conditional:
        samplers[f"from the {mixture}"] = Sampler(model, mixture=mixture)
    for caption, sampler in samplers.items():
        drawn = [sampler.draw(16, first).images for first in range(0, SAMPLES, 16)]
        section.add_grid(caption, np.concatenate(drawn), 8)
    if "samples" in document:
        found = document["samples"]
        note = f"{found['generated']:,} samples from {found['latents_from']} against {found['real']:,} real images"
        section.tables.append(HtmlTable(sample_rows(found["metrics"]), note))
    return section


def _codes(result: EvaluationResult, document: Mapping[str, Any]) -> Section:
    section, model, codes = Section("Codes"), result.run.model, document["codes"]
    if model.latent != "codes" or not codes:
        return section
    section.note = (
        f"{codes['used']} of {codes['codes']} codes are used ({codes['used_share']:.1%}), perplexity "
        f"{codes['perplexity']:.1f}, over {codes['vectors']:,} vectors."
    )
    assert result.images.code_counts is not None
    share = (np.sort(result.images.code_counts)[::-1] / codes["vectors"]).tolist()
    section.charts.append(charts.bars(share, x="codes, the most used first", y="share of all positions"))
    with torch.no_grad():
        batch = with_codes(model, without_padding(next(iter(result.batches))))
    both = with_code_maps(to_uint8(batch["image"][:MAPS]), as_numpy(batch["codes"][:MAPS]))
    section.add_png("images and their codes, a colour for each code", png_bytes(grid(both, 8)))
    return section


def _audit(result: EvaluationResult, document: Mapping[str, Any]) -> Section:
    section = Section("Does it repeat its training images?", pixels=False)
    if "audit" in document:
        section.note = f"Memorisation audit: {document['audit']['verdict']}."
        caption = "the samples that lie nearest to a training image, and those images"
        section.add_png(caption, result.pictures["memorisation.png"])
    return section


def _data_card(index: Index) -> Section:
    section = Section("Data", f"{index.folder}, identity {index.identity}")
    subjects, rows = {}, [["split", "images", "subjects", "classes"]]
    for name in index.splits:
        split = index.split(name)
        known = subjects[name] = {split.subject(number) for number in range(split.count)} - {""}
        labels = Counter(split.label(number) for number in range(split.count))
        classes = ", ".join(
            f"{index.classes[label] if 0 <= label < len(index.classes) else 'unlabelled'} {count:,}"
            for label, count in sorted(labels.items())[:20]
        )
        rows.append([name, f"{split.count:,}", f"{len(known):,}" if known else "not told", classes])
    shared = sorted(set().union(*(a & b for x, a in subjects.items() for y, b in subjects.items() if x < y)))
    note = "No subject is in more than one split."
    if not any(subjects.values()):
        note = "The source does not say which subject an image is of: whether subjects are held apart is not known."
    elif shared:
        note = (
            f"{len(shared)} subjects are in more than one split, such as {shared[0]}: test numbers flatter."
        )
    section.tables.append(HtmlTable(rows, note, words=True))
    return section


def _settings(run: Run) -> Section:
    job = yaml.safe_dump(run.job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return Section("Settings", "The job with every default, as `vaedist-train` takes it.", text=job.rstrip())


def _numbers(row: ImageMetrics) -> str:
    return ", ".join(
        f"{HEADS[name]} {row.metrics[name]:.{digits(name)}f}"
        for name in ("ssim", "ssim_foreground", "psnr")
        if math.isfinite(row.metrics.get(name, math.nan))
    )


def _heat(values: Any) -> Pixels:
    """uint8 (H, W, 3) of numbers in [0, 1]."""
    from matplotlib import colormaps

    colored: Any = colormaps["magma"](values, bytes=True)
    return np.asarray(colored)[..., :3].copy()
