"""Runs evaluated one after the other: their files, the table that compares them, and the HTML report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vaedist.core.errors import UserError
from vaedist.core.imaging import write_atomic
from vaedist.core.terminal import ProgressBars, echo_unless
from vaedist.distributed.memory import keep_freed_memory
from vaedist.evaluation.comparison import Comparison, RunEvaluation
from vaedist.evaluation.evaluate_run import EvaluationConfig, EvaluationResult, evaluate
from vaedist.evaluation.groups import read_groups
from vaedist.evaluation.metrics.features import Extractor, default_extractor
from vaedist.evaluation.metrics.per_image import pairs, pick_evenly
from vaedist.evaluation.text_report import format_report
from vaedist.inference.figures import pair_figure, pair_title
from vaedist.runs.checkpoint_paths import resolve_checkpoint
from vaedist.runs.open_data import open_data, pick_device
from vaedist.runs.open_run import Run, open_run, same_experiment

SHOWN_PAIRS = 8


def evaluate_runs(
    runs: Sequence[str],
    config: EvaluationConfig,
    *,
    out: str | None = None,
    report: str | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> None:
    """Evaluate each run, write its files, and print its tables; of several runs, compare them.

    Args:
        runs: Run or checkpoint folders.
        config: What to measure.
        out: Where results go; None: into `RUN/evaluation/SPLIT`.
        report: The HTML file, if one is wanted.
        quiet: Print no tables and show no progress bars.
        verbose: Say of each stage how long it took.
    """
    keep_freed_memory()
    groups = read_groups(config.groups) if config.groups else {}
    device = pick_device(config.device)
    for path in runs:
        resolve_checkpoint(path)  # a wrong path is refused before the first run is measured
    features = None
    if config.samples:
        given = config.features
        features = Extractor.from_torchscript(given, device) if given else default_extractor(device)
    echo = echo_unless(quiet)
    opened: list[Run] = []
    evaluations: list[RunEvaluation] = []
    reports = []
    for path, folder in zip(runs, _folders(runs, out), strict=True):
        run = open_run(path, weights=config.weights, device=device)
        index = open_data(run, config.data, config.other_data)
        with ProgressBars(quiet=quiet, verbose=verbose) as bars:
            result = evaluate(run, index, config, bar=bars.start, features=features)
        document = result.document(groups)
        written = _write_result(folder or run.folder / "evaluation" / result.split, result, document)
        echo(f"{format_report(document)}\n\n{written}\n")
        opened.append(run)
        # Number of the first run that differs from this one by its seed alone.
        experiment = next(number for number, other in enumerate(opened) if same_experiment(other, run))
        evaluations.append(RunEvaluation(run.job.name, run.job.seed, experiment, document))
        if report:
            from vaedist.evaluation.html_report.sections import run_report

            reports.append(run_report(result, document))
    if len(runs) > 1:
        comparison = Comparison(evaluations)
        echo(text := comparison.text())
        if out:
            tables = {"format": 1, "tables": comparison.document()}
            contents = {"comparison.json": _as_json(tables), "comparison.txt": f"{text}\n".encode()}
            echo(f"\n{_write(Path(out), contents)}")
    if report:
        from vaedist.evaluation.html_report.page import page

        file = Path(report)
        echo(f"\n{_write(file.parent, {file.name: page(opened, evaluations, reports)})}")


def _folders(runs: Sequence[str], out: str | None) -> list[Path | None]:
    """Where each run's results go; None: into the run."""
    if out is None:
        return [None] * len(runs)
    if len(runs) == 1:
        return [Path(out)]
    names = [Path(run).resolve().name for run in runs]
    return [
        Path(out, name if names.count(name) == 1 else f"{number}-{name}")
        for number, name in enumerate(names, 1)
    ]


def _write_result(folder: Path, result: EvaluationResult, document: dict[str, Any]) -> str:
    lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in result.images.lines())
    contents = {"metrics.json": _as_json(document), "images.jsonl": lines.encode(), **result.pictures}
    if result.run.model.reconstructs:
        contents["pairs.png"] = _pair_figure(result)
    return _write(folder, contents)


def _pair_figure(result: EvaluationResult) -> bytes:
    run = result.run
    rows = pick_evenly(result.images.rows, SHOWN_PAIRS)
    originals, others = pairs(run.model, result.batches, [row.sample for row in rows])
    titles = [f"{row.key[:24]}\n{pair_title(row.metrics)}" for row in rows]
    heading = f"{run.job.name}, {run.job.kind}, step {run.step}: {result.split}, worst to best"
    return pair_figure(originals, others, titles, heading=heading)


def _as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _write(folder: Path, contents: dict[str, bytes]) -> str:
    """Write files into a folder that is private to the user; a line for each."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; choose another place") from None
    for name, content in contents.items():
        write_atomic(folder / name, content)
    return "\n".join(f"wrote {folder / name}" for name in contents)
