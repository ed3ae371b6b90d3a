"""What one run has to show, by what its model can do: the values that the page's template fills in."""

from __future__ import annotations

import base64
import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import yaml

from vaedist.core.errors import NotDefined
from vaedist.core.imaging import Pixels, as_numpy, channels_last, grid, png_bytes, to_uint8
from vaedist.data.format.index import Index
from vaedist.evaluation.evaluate_model import Batches, EvaluationResult
from vaedist.evaluation.html_report import charts
from vaedist.evaluation.metrics import latents
from vaedist.evaluation.metrics.per_image import ImageMetrics, pairs, pick_evenly, with_codes, without_padding
from vaedist.evaluation.metrics.tables import HEADS, digits, metrics_rows
from vaedist.evaluation.text_report import format_report
from vaedist.inference.latent_space import interpolation
from vaedist.inference.sample_files import with_code_maps
from vaedist.inference.sampling import Sampler
from vaedist.inference.stored_mixture import load_mixture
from vaedist.runs.open_run import Run
from vaedist.runs.run_folder import RunFolder
from vaedist.training.run_log import read_metrics

PAIRS = 24
SAMPLES = 64
STRIPS, FRAMES = 4, 9
MAPS = 8
MOST_POINTS = 4000
"""Images on the map of the latents."""
FEWEST_FOR_UMAP = 32
"""Two neighbourhoods of 15; below 4 images it fails."""

_CURVES = (
    ("loss", "loss"),
    ("mse", "squared error"),
    ("distortion", "distortion, nats"),
    ("rate", "rate, nats"),
    ("active_units", "active units"),
    ("codes_used", "codes used"),
    ("perplexity", "perplexity of the codes"),
    ("kid", "KID of samples"),
    ("nats_per_token", "nats per code"),
)
_PHASES = {"train": "training", "validate": "validation"}


@dataclass(frozen=True)
class ImagePair:
    """One image and what was made of it, as data URIs."""

    title: str
    numbers: str
    original: str
    made: str
    difference: str


@dataclass(frozen=True)
class HtmlTable:
    """Cells as text; the first row is the head, the first column names the rows."""

    rows: list[list[str]]
    note: str = ""
    words: bool = False
    """Cells hold sentences, which may be broken, not numbers."""


@dataclass
class Section:
    """One part of a run's page; what is empty is not shown."""

    title: str
    note: str = ""
    charts: list[str] = field(default_factory=list)
    """SVG."""
    pictures: list[tuple[str, str]] = field(default_factory=list)
    """Caption and data URI."""
    tables: list[HtmlTable] = field(default_factory=list)
    pairs: list[ImagePair] = field(default_factory=list)
    text: str = ""
    """Set as it stands."""
    pixels: bool = True
    """The pictures are images of the data, whose pixels are shown as such."""

    def __bool__(self) -> bool:
        return bool(self.charts or self.pictures or self.tables or self.pairs or self.text)


@dataclass(frozen=True)
class RunReport:
    """One run."""

    name: str
    about: str
    alarm: str
    facts: list[tuple[str, str]]
    sections: list[Section]


def run_report(
    run: Run, index: Index, batches: Batches, found: EvaluationResult, document: Mapping[str, Any]
) -> RunReport:
    """Everything that the page shows of a run.

    Args:
        run: Opened, on the device of the batches.
        index: The data that it was measured on.
        batches: The split, as the model is shown it.
        found: What `evaluate` measured.
        document: The JSON document that was written.
    """
    data = document["data"]
    size = " x ".join(str(axis) for axis in data["shape"])
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    facts = [
        ("variant", f"{document['kind']}, {parameters:,} parameters"),
        ("weights", f"step {document['step']:,}, {document['weights']}, {document['checkpoint']}"),
        (
            "measured on",
            f"{document['images']:,} of {data['split_images']:,} images of {size}, split {data['split']}",
        ),
    ]
    parts = (
        _reconstructions(run, batches, found, document),
        _samples(run, document),
        _latents(run, index, batches, found, document),
        _codes(run, batches, found, document),
        _audit(found, document),
        _curves(run),
        _data_card(index),
        _settings(run),
        Section("Every number", "As `vaedist-evaluate` prints it.", text=format_report(document)),
    )
    alarm = document["collapse"]["told"] if document["collapse"] else ""
    if data["other_data"]:
        alarm = f"These are not the data that the run was trained from. {alarm}".strip()
    return RunReport(
        run.job.name, f"{document['kind']} of {size} images", alarm, facts, [part for part in parts if part]
    )


def picture(images: Any) -> str:
    """A data URI of uint8 (H, W) or (H, W, 3)."""
    return png_uri(png_bytes(images))


def png_uri(content: bytes) -> str:
    """A data URI of a PNG file."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


# Sections ----------------------------------------------------------------------------------------------------


def _reconstructions(
    run: Run, batches: Batches, found: EvaluationResult, document: Mapping[str, Any]
) -> Section:
    section = Section("Reconstructions")
    if not run.model.reconstructs:
        return section
    rows = pick_evenly(found.evaluation.rows, PAIRS)
    originals, made = pairs(run.model, batches, [row.sample for row in rows])
    section.note = (
        f"{len(rows)} images from the worst reconstruction to the best, evenly over the split. The difference is the "
        "mean over channels, on one scale for all."
    )
    gaps = np.abs(originals.astype(np.float64) - made).mean(axis=1)
    largest = float(gaps.max()) or 1.0
    for row, original, other, gap in zip(
        rows, channels_last(originals), channels_last(made), gaps, strict=True
    ):
        numbers = _numbers(row)
        heat = _heat(gap / largest)
        section.pairs.append(ImagePair(row.key, numbers, picture(original), picture(other), picture(heat)))
    images = document["images"]
    held = {"this run": document["metrics"], **document["baselines"]}
    section.tables.append(
        HtmlTable(
            metrics_rows({name: (images, metrics) for name, metrics in held.items()}),
            "Mean ± standard deviation over images; foreground: where the original is above 0.",
        )
    )
    if document.get("groups"):
        for name, members in document["groups"].items():
            values = {str(group): (part["images"], part["metrics"]) for group, part in members.items()}
            if len(values) > 1:
                section.tables.append(HtmlTable(metrics_rows(values, name)))
    return section


def _samples(run: Run, document: Mapping[str, Any]) -> Section:
    section = Section("Samples")
    samplers = {}
    if run.model.samples:
        samplers["from the prior, seed 0, none picked"] = Sampler(run.model)
    mixture = load_mixture(run) if run.model.latent in ("vector", "map") else None
    if mixture is not None and not run.model.conditional:
        samplers[f"from the {mixture}"] = Sampler(run.model, mixture=mixture)
    for caption, sampler in samplers.items():
        section.pictures.append((caption, picture(grid(channels_last(_drawn(sampler)), 8))))
    if "samples" in document:
        metrics = document["samples"]["metrics"]
        names = list(metrics["this run"])
        rows = [["", *metrics]] + [
            [name, *(f"{held[name]:.4g}" if name in held else "-" for held in metrics.values())]
            for name in names
        ]
        told = document["samples"]
        note = (
            f"{told['generated']:,} samples from {told['latents_from']} against {told['real']:,} real images"
        )
        section.tables.append(HtmlTable(rows, note))
    return section


def _drawn(sampler: Sampler) -> Pixels:
    return np.concatenate([sampler.draw(16, first).images for first in range(0, SAMPLES, 16)])


def _latents(
    run: Run, index: Index, batches: Batches, found: EvaluationResult, document: Mapping[str, Any]
) -> Section:
    section = Section("Latents")
    if run.model.latent not in ("vector", "map"):
        return section
    held = found.posteriors
    if held is None:  # not measured: --importance 0
        try:
            held = latents.collect_latents(run.model, batches, seed=run.job.seed)
        except NotDefined:
            return section
    held = held.every(max(1, -(-len(held.keys) // MOST_POINTS)))
    flat = held.mean.double().numpy()
    if min(flat.shape) >= 2:
        points, axes = _plane(flat)
        section.charts.append(charts.scatter(points, _groups(held, index, document), x=axes[0], y=axes[1]))
        section.note = (
            f"Each point is one image of the split, at the mean of its posterior ({axes[2]}), coloured by "
            f"{'class' if len(index.classes) > 1 else 'subject'}."
        )
    if held.log_variance is not None:
        kl = sorted(held.kl().tolist(), reverse=True)
        section.charts.append(charts.bars(kl, x="latent numbers, the most used first", y="KL, nats"))
    section.pictures += list(_strips(run, held))
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


def _groups(held: latents.Latents, index: Index, document: Mapping[str, Any]) -> list[str]:
    """The class of each image; where there is but one, its subject."""
    if len(index.classes) > 1:
        return [index.classes[label] if label >= 0 else "unlabelled" for label in held.labels.tolist()]
    split = index.split(document["data"]["split"])
    subjects = {split.key(number): split.subject(number) for number in range(split.count)}
    return [subjects.get(key) or "all" for key in held.keys]


def _strips(run: Run, held: latents.Latents) -> Iterator[tuple[str, str]]:
    """From one image of the split to another through the latents."""
    count = min(2 * STRIPS, len(held.keys) // 2 * 2)
    if count < 2:
        return
    chosen = np.linspace(0, len(held.keys) - 1, count).round().astype(int).tolist()
    weight = next(run.model.parameters())
    rows = []
    for a, b in zip(chosen[::2], chosen[1::2], strict=True):
        ends = [held.mean[place].reshape(held.shape).to(weight.device, weight.dtype) for place in (a, b)]
        label = int(held.labels[a]) if run.model.conditional else None
        with torch.no_grad():
            rows.append(interpolation(run.model, ends[0], ends[1], FRAMES, label))
    yield (
        f"{len(rows)} ways from one image of the split (left) to another (right) through the latents",
        picture(grid(channels_last(np.concatenate(rows)), FRAMES)),
    )


def _codes(run: Run, batches: Batches, found: EvaluationResult, document: Mapping[str, Any]) -> Section:
    section = Section("Codes")
    if run.model.latent != "codes" or not document["codes"]:
        return section
    told = document["codes"]
    section.note = (
        f"{told['used']} of {told['codes']} codes are used ({told['used_share']:.1%}), perplexity "
        f"{told['perplexity']:.1f}, over {told['vectors']:,} vectors."
    )
    assert found.evaluation.code_counts is not None
    share = (np.sort(found.evaluation.code_counts)[::-1] / told["vectors"]).tolist()
    section.charts.append(charts.bars(share, x="codes, the most used first", y="share of all positions"))
    with torch.no_grad():
        batch = with_codes(run.model, without_padding(next(iter(batches))))
    both = with_code_maps(to_uint8(batch["image"][:MAPS]), as_numpy(batch["codes"][:MAPS]))
    section.pictures.append(("images and their codes, a colour for each code", picture(grid(both, 8))))
    return section


def _audit(found: EvaluationResult, document: Mapping[str, Any]) -> Section:
    section = Section("Does it repeat its training images?", pixels=False)
    if "audit" not in document:
        return section
    section.note = f"Memorisation audit: {document['audit']['verdict']}."
    if "memorisation.png" in found.pictures:
        section.pictures.append(
            (
                "the samples that lie nearest to a training image, and those images",
                png_uri(found.pictures["memorisation.png"]),
            )
        )
    return section


def _curves(run: Run) -> Section:
    section = Section("Curves of training")
    rows = read_metrics(RunFolder(run.folder).metrics)
    for name, title in _CURVES:
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            for key, value in row.items():
                base, _, phase = key.partition("/")
                if (
                    base.partition("[")[0] != name
                    or not isinstance(value, int | float)
                    or not math.isfinite(value)
                ):
                    continue
                told = " ".join(part for part in (_PHASES.get(row["kind"], row["kind"]), phase) if part)
                series.setdefault(told, []).append((row["step"], value))
        if series and max(map(len, series.values())) > 1:
            section.charts.append(charts.lines(series, x="step", y=title, logarithmic=name in ("mse", "kid")))
    return section


def _data_card(index: Index) -> Section:
    section = Section("Data", f"{index.folder}, identity {index.identity}")
    subjects, rows = {}, [["split", "images", "subjects", "classes"]]
    for name in index.splits:
        split = index.split(name)
        held = {split.subject(number) for number in range(split.count)} - {""}
        labels = Counter(split.label(number) for number in range(split.count))
        subjects[name] = held
        classes = ", ".join(
            f"{index.classes[label] if 0 <= label < len(index.classes) else 'unlabelled'} {count:,}"
            for label, count in sorted(labels.items())[:20]
        )
        rows.append([name, f"{split.count:,}", f"{len(held):,}" if held else "not told", classes])
    shared = sorted(set().union(*(a & b for x, a in subjects.items() for y, b in subjects.items() if x < y)))
    if not any(subjects.values()):
        note = "The source does not say which subject an image is of: whether subjects are held apart is not known."
    elif shared:
        note = (
            f"{len(shared)} subjects are in more than one split, such as {shared[0]}: test numbers flatter."
        )
    else:
        note = "No subject is in more than one split."
    section.tables.append(HtmlTable(rows, note, words=True))
    return section


def _settings(run: Run) -> Section:
    job = yaml.safe_dump(run.job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return Section("Settings", "The job with every default, as `vaedist-train` takes it.", text=job.rstrip())


# Around them -------------------------------------------------------------------------------------------------


def _numbers(row: ImageMetrics) -> str:
    told = [
        f"{title} {row.metrics[name]:.{digits(name)}f}"
        for name, title in HEADS.items()
        if name in ("ssim", "ssim_foreground", "psnr") and math.isfinite(row.metrics.get(name, math.nan))
    ]
    return ", ".join(told)


def _heat(values: Any) -> Pixels:
    """uint8 (H, W, 3) of numbers in [0, 1]."""
    from matplotlib import colormaps

    coloured: Sequence[Any] = colormaps["magma"](values, bytes=True)
    return np.asarray(coloured)[..., :3].copy()
