"""Peak memory of a training process, by the number of images in its data set, without a cache and with one."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Question, Rate, job_of, packed, peak_mib


def questions(folder: Path, asked: argparse.Namespace) -> Iterator[Question]:
    contestants = {
        f"{images:,} images{', cache: memory' if cache == 'memory' else ''}": measure(folder, images, cache)
        for cache in ("none", "memory")
        for images in asked.counts
    }
    title = "Peak memory of training, vqvae, 64x64"
    yield Question(title, "MiB", contestants, f"{asked.counts[0]:,} images", once=True)


def measure(folder: Path, images: int, cache: str) -> Rate:
    shards = packed(folder, size=64, train=images)
    return lambda: peak_mib(f"from benchmarks.memory import train; train({str(shards)!r}, {cache!r})")


def train(shards: str, cache: str) -> None:
    """In a process of its own: train a little."""
    from vaedist.training.attempt import FitOptions
    from vaedist.training.dist import Group
    from vaedist.training.loop import fit

    job = job_of("vqvae, conv, 64x64", Path(shards), 60, cache=cache)
    with tempfile.TemporaryDirectory() as run:
        fit(job, Path(run) / "run", group=Group.join("cpu"), options=FitOptions(quiet=True))
