"""The file: runs, their comparison and their making, through the template beside this module."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import vaedist
from vaedist.core.errors import UserError
from vaedist.evaluation.comparison import SEEDS, Comparison, RunEvaluation
from vaedist.evaluation.html_report.content import HtmlTable, RunReport
from vaedist.runs.open_run import Run
from vaedist.runs.provenance import read_starts

_HERE = Path(__file__).parent


def page(runs: Sequence[Run], entries: Sequence[RunEvaluation], shown: Sequence[RunReport]) -> bytes:
    """The whole file.

    Args:
        runs: In the order in which they are shown; several are compared.
        entries: Their evaluations.
        shown: What is shown of each.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    names = list(dict.fromkeys(contents.name for contents in shown))
    text = environment.get_template("page.html").render(
        title=names[0] if len(names) == 1 else f"{len(runs)} runs: {', '.join(names)}",
        version=vaedist.__version__,
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        runs=shown,
        comparisons=list(_comparisons(entries)) if len(runs) > 1 else [],
        made_by=list(_made_by(runs)),
    )
    return text.encode()


def _comparisons(entries: Sequence[RunEvaluation]) -> Iterator[HtmlTable]:
    comparison = Comparison(entries)
    for table, rows in zip(comparison.document(), comparison.rows(), strict=True):
        data = table["data"]
        verdicts = "; ".join(table["verdicts"]) or f"none beats another: that takes {SEEDS} seeds of each"
        yield HtmlTable(
            rows,
            f"{data['split']}, {data['images']:,} images, mean ± standard deviation over seeds. {verdicts}.",
        )


def _made_by(runs: Sequence[Run]) -> Iterator[HtmlTable]:
    """The exact commands, and what they ran on."""
    rows = [["run", "when", "command", "commit", "engine", "machine"]]
    libraries: dict[str, str] = {}
    for run in runs:
        try:
            starts = read_starts(run.folder)
        except UserError:  # a damaged record of starts takes nothing from what was measured
            starts = []
        for start in starts:
            libraries |= start.get("libraries", {})
            commit = start.get("git_commit") or f"version {start.get('vaedist', 'unknown')}"
            engine = f"{start.get('engine', '')}, {start.get('workers', '')} processes"
            when, command, host = (start.get(name) or "" for name in ("time", "command", "host"))
            rows.append([run.job.name, when, command, commit, engine, host])
    rows.append(["this page", "", shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "", "", ""])
    yield HtmlTable(rows, "Each start of each run, oldest first.", words=True)
    if libraries:
        yield HtmlTable([["library", "version"], *([name, version] for name, version in libraries.items())])
