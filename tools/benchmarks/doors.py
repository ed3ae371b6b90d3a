"""Seconds until a door has printed its `--help`, beside a Python that does nothing and one that imports torch."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Question, Rate

DOORS = ("shard", "train", "tune", "evaluate", "sample", "launch")


def questions(_folder: Path, _asked: argparse.Namespace) -> Iterator[Question]:
    contestants = {f"vaedist-{door} --help": command("-m", f"vaedist.{door}", "--help") for door in DOORS}
    contestants |= {"python -c pass": command("-c", "pass"), "import torch": command("-c", "import torch")}
    yield Question("Start of the doors", "s", contestants, "python -c pass")


def command(*words: str) -> Rate:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    return seconds
