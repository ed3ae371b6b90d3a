"""Seconds until a command has printed its `--help`, beside a Python that does nothing and one that imports torch."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Question, Rate

COMMANDS = ("shard", "train", "tune", "evaluate", "sample", "launch")


def questions(_folder: Path, _asked: argparse.Namespace) -> Iterator[Question]:
    contestants = {
        f"vaedist-{name} --help": time_command("-m", f"vaedist.{name}", "--help") for name in COMMANDS
    }
    contestants |= {
        "python -c pass": time_command("-c", "pass"),
        "import torch": time_command("-c", "import torch"),
    }
    yield Question("Start of the commands", "s", contestants, "python -c pass")


def time_command(*words: str) -> Rate:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    return seconds
