"""Seconds from a data set that is open to its first batch, at the start of an epoch and deep inside one."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import BATCH, Question, Rate, packed


def questions(folder: Path, _asked: argparse.Namespace) -> Iterator[Question]:
    from vaedist.data.format.index import Index
    from vaedist.data.loading.stream import TrainingStream, TrainingStreamConfig

    index = Index.open(packed(folder, size=64, train=20_000))
    steps = 20_000 // BATCH

    def first_batch_at(step: int) -> Rate:
        def seconds() -> float:
            stream = TrainingStream(index, "train", TrainingStreamConfig(batch_size=BATCH, seed=0, workers=2))
            start = time.perf_counter()
            batches = stream.batches(step)
            next(batches)
            taken = time.perf_counter() - start
            stream.close()
            return taken

        return seconds

    places = {
        "step 0": 0,
        "the middle of the epoch": steps // 2,
        "step 1,000 of epoch 50": 50 * steps + 1000 % steps,
    }
    yield Question(
        "First batch after a resume, 20,000 images of 64x64",
        "s",
        {name: first_batch_at(step) for name, step in places.items()},
        "step 0",
    )
