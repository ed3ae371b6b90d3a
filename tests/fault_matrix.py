"""Rows of the fault matrix: what a test marked `faults` measured, as one line of JSON in the file `$VAEDIST_FAULTS`.

`tools/faults` sets that variable, runs the marked tests and makes docs/faults.md of the lines. A test says what the
row is in its marker and what it measured through pytest's `record_property`:

    @pytest.mark.faults(row="F1", fault="kill -9 of a rank", ray="what Ray itself does, and where that was measured")
    def test_...(record_property):
        record_property("recovery", 9.7)             # seconds from the fault, or from the command that follows it,
                                                     # to the first step trained after it
        record_property("parts", "detection 0.0 s, ...")
        record_property("told", "rank 1 of 2 was killed by SIGKILL ...")
"""

from __future__ import annotations

import json
import os

import pytest


def note(item: pytest.Item, report: pytest.TestReport) -> None:
    """Append the row of a marked test, if anybody collects rows: what it leaves behind counts, so a later line wins."""
    marker, target = item.get_closest_marker("faults"), os.environ.get("VAEDIST_FAULTS")
    over = report.when == "call" or not report.passed
    if marker is None or not target or not over:
        return
    row = {"row": "", "fault": "", "ray": "", **marker.kwargs, **dict(report.user_properties)}
    row |= {"outcome": report.outcome, "test": item.nodeid, "ci": item.get_closest_marker("ci") is not None}
    if report.skipped:
        row["told"] = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
    row |= {"seconds": round(report.duration, 1), "load": round(os.getloadavg()[0], 1)}
    with open(target, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
