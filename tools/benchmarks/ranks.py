"""Images/s of one process, of two that train one model together, and of two that do not know each other.

One thread each; the two share the global batch. Two processes that do not talk are the limit: they too share one memory
bus and its caches, and what they lose against twice one process is the machine's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import Question, job_of, logged_rate, packed

JOB = "vqvae, conv, 64x64"
EVERY = 20


def questions(folder: Path, asked: argparse.Namespace) -> Iterator[Question]:
    shards = packed(folder, size=64, train=640)
    job = job_of(JOB, shards, asked.steps + EVERY, cache="memory").model_dump(mode="json")
    job["train"]["threads"] = 1
    yield Question(
        f"Processes of one thread, {JOB}",
        "images/s",
        {
            "2 processes, one model": lambda: sum(rates(job, workers=2, runs=1)),
            "2 processes, a model each": lambda: sum(rates(job, workers=1, runs=2)),
            "1 process": lambda: sum(rates(job, workers=1, runs=1)),
        },
        "1 process",
    )


def rates(job: dict[str, Any], *, workers: int, runs: int) -> list[float]:
    """Images/s of each of several runs side by side: the median of their log lines but the first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "job.yaml"
        file.write_text(yaml.safe_dump(job))
        folders = [Path(scratch) / f"run-{number}" for number in range(runs)]
        options = ["--workers", str(workers), "--device", "cpu", "-q"]
        command = [sys.executable, "-m", "vaedist.train", str(file), *options, "--run-dir"]
        started = [subprocess.Popen([*command, str(folder)], env=environment) for folder in folders]
        for process in started:
            if process.wait():
                raise SystemExit(process.returncode)
        return [logged_rate(folder) for folder in folders]
