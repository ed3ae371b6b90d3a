"""Where a start's time goes: phases from process to process, and the line that rank 0 prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.run_commands import small_job, write_job
from vaedist.runs.startup_timings import (
    VARIABLE,
    startup_summary,
    timings_from_environment,
    timings_to_environment,
)


def test_stages_end_where_the_next_begins() -> None:
    phases = [("supervisor", 10.0), ("srun", 11.5), ("imports", 11.52), ("first step", 14.52)]
    assert (
        startup_summary(phases, 15.0)
        == "first step after 5.0 s: supervisor 1.5 s, imports 3.0 s, first step 0.5 s"
    )


def test_timings_pass_through_the_environment() -> None:
    phases = (("supervisor", 10.25), ("srun", 11.5))
    assert timings_from_environment(timings_to_environment(phases)) == phases
    for nothing in ({}, {VARIABLE: ""}, {VARIABLE: "[1]"}, {VARIABLE: "{"}, {VARIABLE: '[["a", "b"]]'}):
        assert timings_from_environment(nothing) == ()


def test_a_process_knows_its_start_time() -> None:
    code = "from vaedist.runs.startup_timings import process_start_time; print(process_start_time())"
    before = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert before - 0.05 <= float(done.stdout) <= time.time()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_rank_prints_the_summary_once(workers: int, phantom: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.yaml", small_job(phantom, steps=3))
    words = [sys.executable, "-m", "vaedist.train", str(job), "--run-dir", str(tmp_path / "run")]
    long_ago = json.dumps([["supervisor", time.time() - 100]])
    done = subprocess.run(
        [*words, "--workers", str(workers)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {VARIABLE: long_ago},
    )
    lines = re.findall(r"first step after (\d+\.\d) s: (.*)", done.stdout)
    assert len(lines) == 1
    total, parts = float(lines[0][0]), dict(re.findall(r"([a-z ]+?) (\d+\.\d) s", lines[0][1]))
    names = [name.strip() for name in parts]
    assert names[0] == "supervisor" and ("launcher" in names) == (workers == 2) and "imports" in names
    assert total > 100
    assert sum(map(float, parts.values())) == pytest.approx(total, abs=0.5)
