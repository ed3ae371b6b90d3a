"""Peak memory of a training process, by the number of images in its data set, without a cache and with one.

Without a cache whole shards lie in memory, two for each lane and one for each reader at most
(`vaedist.data.loading.stream`): a set whose shards are fewer than that is held whole, and a larger one costs no
more. Tars of 256 images put all but the smallest set here beyond that.
"""

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
    title = f"Peak memory of training, vqvae, 64x64, tars of {PER_SHARD} images"
    yield Question(title, "MiB", contestants, f"{asked.counts[0]:,} images", once=True)


PER_SHARD = 256


def measure(folder: Path, images: int, cache: str) -> Rate:
    shards = packed(folder, size=64, train=images, per_shard=PER_SHARD)
    return lambda: peak_mib(f"from benchmarks.memory import train; train({str(shards)!r}, {cache!r})")


def train(shards: str, cache: str) -> None:
    """In a process of its own: train a little."""
    from vaedist.distributed.process_group import Group
    from vaedist.runs.fit_options import FitOptions
    from vaedist.training.loop import fit

    job = job_of("vqvae, conv, 64x64", Path(shards), 60, cache=cache)
    with tempfile.TemporaryDirectory() as run:
        fit(job, Path(run) / "run", group=Group.join("cpu"), options=FitOptions(quiet=True))
