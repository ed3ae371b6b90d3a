"""Several evaluations in one table, and what may be said of them.

Runs of one experiment differ only in their seed: they share a column, mean ±spread, where the spread is the standard
deviation over seeds (divided by n - 1). A column of one run has no spread: that over images says nothing of another
training.

Numbers stand in one row only where they mean the same: likelihoods by what they are the probability of,
surrogates by their likelihood, nats per token by the tokenizer, sample metrics by their extractor and sampler. Runs
measured on other images get a table of their own.

"A beats B" is said of two experiments with at least three seeds each, and only where every seed of A is better than
every seed of B.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vaedist.evaluation.metrics.sample_metrics import SAMPLE_METRICS, base_name
from vaedist.evaluation.metrics.tables import HEADS, columns, digits, metrics_table
from vaedist.evaluation.sample_quality import PRIOR
from vaedist.evaluation.text_report import NATS

SEEDS = 3
"""Fewest runs of each experiment for a verdict."""

Direction = Literal["min", "max"]


@dataclass(frozen=True)
class RunEvaluation:
    """One run's evaluation."""

    name: str
    """Of the job."""
    seed: int
    experiment: int
    """Number of the experiment: equal for runs that differ only in their seed."""
    document: Mapping[str, Any]


@dataclass(frozen=True)
class ComparedNumber:
    """What is compared: a line of the table."""

    title: str
    digits: int = 4
    better: Direction | None = None


def compared_numbers(document: Mapping[str, Any]) -> dict[ComparedNumber, float]:
    """What of an evaluation goes into the table; values that are not defined are left out."""
    found: dict[ComparedNumber, float | None] = {}
    for name, title in HEADS.items():
        if name in document["metrics"]:
            better: Direction = "min" if name in ("mse", "mae") else "max"
            found[ComparedNumber(title, digits(name), better)] = document["metrics"][name]["mean"]
    likelihood = document.get("likelihood")
    if likelihood:
        title = NATS[likelihood["name"]]
        if likelihood["name"] == "surrogate":
            title += f" ({likelihood['likelihood']})"
        found[ComparedNumber(title, 2, "min")] = likelihood["nll"]["mean"]
        _bits(found, likelihood)
    latents = document.get("latents")
    if latents:
        found[ComparedNumber("active units", 1)] = latents["active_units"]
        found[ComparedNumber("MMD", 5)] = latents.get("mmd")
        split = latents.get("split", {})
        found[ComparedNumber("rate", 2)] = split.get("rate")
        found[ComparedNumber("mutual inf.", 2)] = split.get("mutual_information")
        found[ComparedNumber("KL(q(z)||p)", 2)] = split.get("marginal_kl")
    if document["codes"]:
        found[ComparedNumber("codes used %", 1, "max")] = 100 * document["codes"]["used_share"]
        found[ComparedNumber("perplexity", 1)] = document["codes"]["perplexity"]
    prior = document.get("prior")
    if prior:
        title = f"nats/token [{document['tokenizer'][:6]}]"
        found[ComparedNumber(title, 4, "min")] = prior["nats_per_token"]["prior"]["mean"]
        _bits(found, prior)
    samples = document.get("samples")
    if samples:
        how = "" if samples["latents_from"] == PRIOR else ", gmm"
        for name, value in samples["metrics"]["this run"].items():
            found[ComparedNumber(f"{name}{how}", 4, SAMPLE_METRICS.get(base_name(name)))] = value
    return {number: value for number, value in found.items() if value is not None and math.isfinite(value)}


def beats(one: Sequence[float], other: Sequence[float], better: Direction) -> bool:
    """Whether every seed of `one` is better than every seed of `other`."""
    return min(one) > max(other) if better == "max" else max(one) < min(other)


def _bits(found: dict[ComparedNumber, float | None], part: Mapping[str, Any]) -> None:
    if part["bits_per_dim"] is not None:
        found[ComparedNumber(f"bits/dim, {part['name']}", 4, "min")] = part["bits_per_dim"]["mean"]


class Comparison:
    """Evaluations side by side.

    Args:
        entries: At least one.
    """

    def __init__(self, entries: Sequence[RunEvaluation]) -> None:
        tables: dict[str, list[RunEvaluation]] = {}
        for entry in entries:
            tables.setdefault(_measured_on(entry.document), []).append(entry)
        self._tables = {images: (entries, _experiments(entries)) for images, entries in tables.items()}

    def document(self) -> list[dict[str, Any]]:
        """One JSON object per table: `data`, `experiments` with their runs and numbers, and `verdicts`."""
        return [
            {
                "data": json.loads(images),
                "experiments": [experiment.document() for experiment in experiments],
                "verdicts": list(_verdicts(experiments)),
            }
            for images, (_, experiments) in self._tables.items()
        ]

    def rows(self) -> list[list[list[str]]]:
        """The cells of each table of `document`, as printed; the first row is its head."""
        return [_rows(experiments) for _, experiments in self._tables.values()]

    def text(self) -> str:
        """The tables and verdicts, as printed."""
        return "\n\n".join("\n".join(_table(*table)) for table in self._tables.values())


def _table(entries: Sequence[RunEvaluation], experiments: Sequence[_Experiment]) -> Iterator[str]:
    first = entries[0].document
    yield (
        f"{first['data']['split']} of {first['data']['path']}, {first['images']} images: mean ±spread (standard "
        "deviation over seeds)"
    )
    yield columns(_rows(experiments))
    rows = {
        name: (entry.document["images"], metrics)
        for entry in entries
        for name, metrics in entry.document["baselines"].items()
    }
    if rows:
        yield f"\n{metrics_table(rows, 'baselines', spread=False)}\n"
    verdicts = list(_verdicts(experiments))
    if verdicts:
        yield f"every seed of one better than every seed of the other, {SEEDS} seeds of each at least:"
        yield from verdicts
    elif len(experiments) > 1:
        yield (
            f"none beats another: that takes {SEEDS} seeds of each, and every seed of one better than every seed "
            "of the other"
        )


class _Experiment:
    def __init__(self, entries: Sequence[RunEvaluation]) -> None:
        self.entries = entries
        names = dict.fromkeys(entry.name for entry in entries)
        self.title = next(iter(names)) if len(names) == 1 else _common(list(names))
        self.seeds = len({entry.seed for entry in entries})
        if len(entries) > 1:
            self.title += f" ({len(entries)} {'seeds' if self.seeds == len(entries) else 'runs'})"
        self.values: dict[ComparedNumber, list[float]] = {}
        for entry in entries:
            for number, value in compared_numbers(entry.document).items():
                self.values.setdefault(number, []).append(value)

    def document(self) -> dict[str, Any]:
        numbers = self.values.items()
        return {
            "name": self.title,
            "runs": [entry.document["run"] for entry in self.entries],
            "seeds": [entry.seed for entry in self.entries],
            "numbers": {number.title: {"values": values, **_spread(values)} for number, values in numbers},
        }


def _experiments(entries: Sequence[RunEvaluation]) -> list[_Experiment]:
    members: dict[int, list[RunEvaluation]] = {}
    for entry in entries:
        members.setdefault(entry.experiment, []).append(entry)
    found = [_Experiment(part) for part in members.values()]
    titles = [experiment.title for experiment in found]
    for number, experiment in enumerate(found, 1):
        if titles.count(experiment.title) > 1:
            experiment.title = f"{number}: {experiment.title}"
    return found


def _common(names: Sequence[str]) -> str:
    """`vq` of `vq-0`, `vq-1`; the first name where they have no beginning in common."""
    first, last = min(names), max(names)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length].rstrip("-_. ") or names[0]


def _measured_on(document: Mapping[str, Any]) -> str:
    """The images that the numbers are of, as JSON."""
    data = document["data"]
    content = {name: data[name] for name in ("identity", "split", "shape", "binarise")}
    return json.dumps({**content, "images": document["images"]}, sort_keys=True)


def _spread(values: Sequence[float]) -> dict[str, float | int | None]:
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return {"mean": mean, "std": None, "count": 1}
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return {"mean": mean, "std": math.sqrt(variance), "count": len(values)}


def _numbers(experiments: Sequence[_Experiment]) -> list[ComparedNumber]:
    """The lines of the table, each once."""
    return list(dict.fromkeys(number for experiment in experiments for number in experiment.values))


def _rows(experiments: Sequence[_Experiment]) -> list[list[str]]:
    rows = [["", *(experiment.title for experiment in experiments)]]
    for number in _numbers(experiments):
        cells = (_cell(experiment.values.get(number, []), number) for experiment in experiments)
        rows.append([number.title, *cells])
    return rows


def _cell(values: Sequence[float], number: ComparedNumber) -> str:
    if not values:
        return "-"
    found = _spread(values)
    text = f"{found['mean']:.{number.digits}f}"
    return text if found["std"] is None else f"{text} ±{found['std']:.{number.digits}f}"


def _verdicts(experiments: Sequence[_Experiment]) -> Iterator[str]:
    for number in _numbers(experiments):
        if number.better is None:
            continue
        known = [e for e in experiments if min(e.seeds, len(e.values.get(number, ()))) >= SEEDS]
        for one in known:
            beaten = [
                other.title
                for other in known
                if beats(one.values[number], other.values[number], number.better)
            ]
            if beaten:
                yield f"{number.title}: {one.title} beats {', '.join(beaten)}"
