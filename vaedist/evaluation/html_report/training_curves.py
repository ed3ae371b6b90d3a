"""The curves of training and validation, from the run's record of metrics."""

from __future__ import annotations

import math

from vaedist.evaluation.html_report import charts
from vaedist.evaluation.html_report.content import Section
from vaedist.evaluation.metrics.sample_metrics import base_name
from vaedist.runs.run_folder import RunFolder
from vaedist.training.run_log import read_metrics

CURVES = {
    "loss": "loss",
    "mse": "squared error",
    "distortion": "distortion, nats",
    "rate": "rate, nats",
    "active_units": "active units",
    "codes_used": "codes used",
    "perplexity": "perplexity of the codes",
    "kid": "KID of samples",
    "nats_per_token": "nats per code",
}
"""Metric to the title of its chart, in the order of the page."""
_KINDS = {"train": "training", "validate": "validation"}


def training_curves(folder: RunFolder) -> Section:
    """A chart for each metric of `CURVES` that was recorded more than once; a line for each kind of row and phase."""
    section = Section("Curves of training")
    rows = read_metrics(folder.metrics)
    for name, title in CURVES.items():
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            for key, value in row.items():
                metric, _, phase = key.partition("/")
                if base_name(metric) == name and isinstance(value, int | float) and math.isfinite(value):
                    label = f"{_KINDS.get(row['kind'], row['kind'])} {phase}".strip()
                    series.setdefault(label, []).append((row["step"], value))
        if series and max(map(len, series.values())) > 1:
            section.charts.append(charts.lines(series, x="step", y=title, logarithmic=name in ("mse", "kid")))
    return section
