"""The order of training at scale: 100 million samples in 100,000 shards, one rank of 1,024, 1,024 lanes.

Nothing is read but the index. Beside it one permutation of as many numbers as the rank sees in an epoch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Question, packed, peak_mib

SHARDS, SAMPLES, WORLD, ROWS = 100_000, 1_000, 1_024, 32


def questions(folder: Path, _asked: argparse.Namespace) -> Iterator[Question]:
    index = large_index(folder)
    contestants = {
        "open the index": lambda: opened(index)[0],
        "first batch of the rank": lambda: planned(index, steps=1)[0],
        "every batch of its epoch": lambda: planned(index)[0],
        "one permutation of its samples": permutation,
    }
    title = f"Plan: {SHARDS * SAMPLES:,} samples, {SHARDS:,} shards, one rank of {WORLD:,}"
    yield Question(title, "s", contestants, "one permutation of its samples")
    counts = {
        "peak memory, MiB": lambda: peak_mib(f"from benchmarks.plan import *; planned(Path({str(index)!r}))"),
        "shards that the rank opens in an epoch": lambda: float(planned(index)[1]),
    }
    yield Question("What it takes", "", counts, "peak memory, MiB", once=True)


def large_index(folder: Path) -> Path:
    """An index of shards that are not there."""
    out = folder / "large"
    if not (out / "index.json").exists():
        document = json.loads((packed(folder, size=64, train=1000) / "index.json").read_text())
        like = document["splits"]["train"]["shards"][0] | {"count": SAMPLES}
        shards = [
            like | {"tar": f"train-{number:06d}.tar", "columns": f"train-{number:06d}.columns"}
            for number in range(SHARDS)
        ]
        document["splits"] = {"train": {"count": SHARDS * SAMPLES, "shards": shards}}
        out.mkdir()
        (out / "index.json").write_text(json.dumps(document))
    return out


def opened(folder: Path) -> tuple[float, object]:
    from vaedist.data.format.index import Index

    start = time.perf_counter()
    index = Index.open(folder)
    return time.perf_counter() - start, index


def planned(folder: Path, steps: int | None = None) -> tuple[float, int]:
    """Seconds for so many steps of rank 7, and how many shards they are in."""
    from vaedist.data.format.index import Index
    from vaedist.data.loading.order import TrainingOrder, slice_bounds

    counts = Index.open(folder).split("train").counts
    start = time.perf_counter()
    batch = WORLD * ROWS
    order = TrainingOrder(counts, seed=0, batch_size=batch, lanes=WORLD)
    rows = slice_bounds(batch, 7, WORLD)
    shards: set[int] = set()
    for step in range(order.steps_per_epoch if steps is None else steps):
        shards.update((order.rows(step, *rows) // SAMPLES).tolist())
    return time.perf_counter() - start, len(shards)


def permutation() -> float:
    import numpy as np

    start = time.perf_counter()
    np.random.Generator(np.random.PCG64(0)).permutation(SHARDS * SAMPLES // WORLD)
    return time.perf_counter() - start
