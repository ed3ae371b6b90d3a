"""Images/s of `fit`, with its reading, logging and checks, and of a step written by hand.

The same model, optimizer and batch; the hand-written step gets its batches from a list.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import BATCH, JOBS, Question, Rate, job_of, packed


def questions(folder: Path, asked: argparse.Namespace) -> Iterator[Question]:
    for name in JOBS:
        yield Question(f"Loop, {name}", "images/s", loops(folder, name, asked.steps), "bare step")


def loops(folder: Path, name: str, steps: int) -> dict[str, Rate]:
    """`fit` and a bare step of the same job; each call trains from the start, one thread per core."""
    import torch

    from vaedist.context import LaneContext
    from vaedist.data.index import Index
    from vaedist.data.stream import TrainingStream
    from vaedist.models.contract import build, model_config
    from vaedist.training.attempt import FitOptions
    from vaedist.training.dist import Group
    from vaedist.training.loop import fit

    shards = packed(folder, size=64, train=1000)
    job = job_of(name, shards, steps)
    torch.set_num_threads(job.train.threads or 1)

    def whole() -> float:
        ticks: list[float] = []
        with tempfile.TemporaryDirectory() as run:
            fit(
                job,
                Path(run) / "run",
                group=Group.join("cpu"),
                report=lambda _: ticks.append(time.perf_counter()),
                options=FitOptions(quiet=True),
            )
        # The first and the last log tick of training; validation and the last save come after.
        every = job.train.log_every
        ticks = ticks[: steps // every]
        return (len(ticks) - 1) * every * BATCH / (ticks[-1] - ticks[0])

    def bare() -> float:
        index = Index.open(shards)
        model = build(model_config(job.model), index.spec, job.seed)
        stream = TrainingStream(index, "train", batch_size=BATCH, seed=0)
        reading = stream.batches(0)
        batches = [next(reading) for _ in range(steps)]
        stream.close()

        def ctx(step: int) -> LaneContext:
            return LaneContext(seed=0, step=step, batch_size=BATCH, lanes=stream.lanes)

        with torch.no_grad():
            model.prepare(batches[: model.prepare_batches], ctx(0))
        adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        skip = job.train.log_every
        for step, batch in enumerate(batches):
            if step == skip:
                start = time.perf_counter()
            here = ctx(step)
            adam.zero_grad(set_to_none=True)
            model(batch, here)["loss"].mean().backward()
            adam.step()
            with torch.no_grad():
                model.after_step(here)
        return (steps - skip) * BATCH / (time.perf_counter() - start)

    return {"vaedist fit": whole, "bare step": bare}
