"""What checkpoints cost the training that they are written beside.

The stall is how long the training thread waits until its state has been handed to the thread that writes it, the save
before being on the disk. Its limit is a copy of the same bytes. And images/s of a run that saves every `EVERY` steps,
beside those of the same run that does not: what the writing takes from the processor, the memory bus and Python.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import BATCH, Question, Rate, job_of, packed, ticks_of

JOB = "vae, mlp, 64x64"
EVERY = 50
"""A tenth of the default."""


def questions(folder: Path, asked: argparse.Namespace) -> Iterator[Question]:
    import torch

    torch.set_num_threads(1)
    yield Question("Stall of the training thread by a save, 240 MB", "s", stall(), "a copy of the same bytes")
    shards = packed(folder, size=64, train=640)
    rates = {
        "no save": rate(shards, asked.steps, 0),
        f"a save every {EVERY} steps": rate(shards, asked.steps, EVERY),
    }
    yield Question(f"Training of a {JOB}, 10 ms a step", "images/s", rates, "no save")


def stall() -> dict[str, Rate]:
    import torch

    from vaedist.distributed.memory import keep_freed_memory
    from vaedist.runs.checkpoint import Checkpoints, Committer
    from vaedist.training.loop import on_cpu

    keep_freed_memory()  # as training does

    # Weights and Adam's two moments of a network of 20 layers of a million weights each.
    kinds = ("weight", "mean", "square")
    state = {f"{kind}.{layer}": torch.randn(1000, 1000) for kind in kinds for layer in range(20)}

    def handed_over() -> float:
        with tempfile.TemporaryDirectory() as scratch:
            committer = Committer(Checkpoints(Path(scratch)), lambda: None)
            seconds = []
            for step in (1, 2):  # the first one has the memory given to the process
                start = time.perf_counter()
                committer.submit(on_cpu(state), step)
                seconds.append(time.perf_counter() - start)
                committer.join()
            committer.close()
        return seconds[-1]

    def copied() -> float:
        copies = {name: tensor.clone() for name, tensor in state.items()}
        start = time.perf_counter()
        for name, tensor in state.items():
            copies[name].copy_(tensor)
        return time.perf_counter() - start

    return {"vaedist": handed_over, "a copy of the same bytes": copied}


def rate(shards: Path, steps: int, every: int) -> Rate:
    total = 20 + 4 * steps
    job = job_of(JOB, shards, total, cache="memory")
    changes = {"threads": 1, "save_every": every or total}
    job = job.model_copy(update={"train": job.train.model_copy(update=changes)})

    def images_per_second() -> float:
        ticks = ticks_of(job)
        # From the first line of the log to the last one: validation and the last save come after.
        lines = total // job.train.log_every
        return (lines - 1) * job.train.log_every * BATCH / (ticks[lines - 1] - ticks[0])

    return images_per_second
