"""Seconds from the command to the end of the first step, by what starts the process; the limit is torch's own import.

A small convolutional VQ-VAE on 64x64 phantoms. Beside each other: `vaedist-train` on its own, under its launcher with
two processes, and under Ray with one; and a Python that imports torch, builds the same model and takes no step. What
Slurm adds is in the README's table of starts, from tests/real_slurm.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from benchmarks.common import Question, Rate, job_of, packed

LIMIT = "import torch, build the model"
BUILD = """
import torch, yaml
from vaedist.config.job import Job, Spec
from vaedist.config.model_section import model_config
from vaedist.models.contract import build
job = Job.model_validate(yaml.safe_load(open({path!r})))
build(job.model, Spec(1, (64, 64)), 0)
"""


def questions(folder: Path, _asked: argparse.Namespace) -> Iterator[Question]:
    path = folder / "start.yaml"
    job = job_of("vqvae, conv, 64x64", packed(folder, size=64, train=640).resolve(), 1)
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    ways = {
        "vaedist-train": first_step(path),
        "vaedist-train --workers 2": first_step(path, "--workers", "2"),
        "vaedist-train --engine ray": first_step(path, "--engine", "ray"),
        LIMIT: building(path),
    }
    yield Question("Time to the first step", "s", ways, LIMIT)


def first_step(path: Path, *options: str) -> Rate:
    def seconds() -> float:
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "vaedist.train", str(path), "--device", "cpu", *options]
            command += ["--run-dir", f"{scratch}/run"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        match = re.search(r"first step after ([\d.]+) s", done.stdout)
        assert match, f"{done.stdout}\n{done.stderr}"
        return float(match[1])

    return seconds


def building(path: Path) -> Rate:
    def seconds() -> float:
        start = time.perf_counter()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        subprocess.run([sys.executable, "-c", BUILD.format(path=str(path))], check=True, env=environment)
        return time.perf_counter() - start

    return seconds
