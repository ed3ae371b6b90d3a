"""Images/s of `fit`, with its reading, logging and checks, and of a step written by hand.

The same model, optimizer and batch, on one thread. Both read from memory: `fit` through `cache: memory`, once every
image has been decoded (the first epoch does not count), the hand-written step from a list. `fit` also takes the norm
of all gradients and refuses steps that are not finite, as it always does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import BATCH, JOBS, Question, Rate, job_of, packed, ticks_of

IMAGES = 640


def questions(folder: Path, asked: argparse.Namespace) -> Iterator[Question]:
    for name in JOBS:
        yield Question(f"Loop, {name}", "images/s", loops(folder, name, asked.steps), "bare step")


def loops(folder: Path, name: str, steps: int) -> dict[str, Rate]:
    """`fit` and a bare step of the same job; each call trains from the start."""
    import torch

    from vaedist.core.context import LaneContext
    from vaedist.data.format.index import Index
    from vaedist.data.loading.stream import TrainingStream, TrainingStreamConfig
    from vaedist.models.contract import build

    shards = packed(folder, size=64, train=IMAGES)
    skipped = -(-IMAGES // BATCH // 20) * 20
    """Steps before the clock starts: an epoch, in whole log intervals."""
    job = job_of(name, shards, skipped + steps, cache="memory")
    job = job.model_copy(update={"train": job.train.model_copy(update={"threads": 1})})

    def whole() -> float:
        ticks = ticks_of(job)
        # The log ticks from the end of the first epoch to that of training; validation and the last save come after.
        every = job.train.log_every
        first, last = skipped // every - 1, (skipped + steps) // every - 1
        return (last - first) * every * BATCH / (ticks[last] - ticks[first])

    def bare() -> float:
        torch.set_num_threads(1)
        index = Index.open(shards)
        model = build(job.model, index.spec, job.seed)
        stream = TrainingStream(index, "train", TrainingStreamConfig(batch_size=BATCH, seed=0))
        reading = stream.batches(0)
        batches = [next(reading) for _ in range(IMAGES // BATCH)]
        stream.close()

        def ctx(step: int, phase: str) -> LaneContext:
            return LaneContext(seed=0, step=step, phase=phase, batch_size=BATCH, lanes=stream.lanes)

        with torch.no_grad():
            model.prepare(batches[: model.prepare_batches], ctx(0, "prepare"))
        trained = {phase: list(model.parameters_of(phase)) for phase in model.phases}
        adams = {phase: torch.optim.Adam(own, lr=1e-3, fused=True) for phase, own in trained.items()}
        start = 0.0
        for step in range(WARM + steps):
            if step == WARM:
                start = time.perf_counter()
            for phase, adam in adams.items():
                others = [parameter for other, own in trained.items() if other != phase for parameter in own]
                _freeze(others, True)
                here = ctx(step, phase)
                adam.zero_grad(set_to_none=True)
                model(batches[step % len(batches)], here)["loss"].mean().backward()
                adam.step()
                with torch.no_grad():
                    model.after_step(here)
                _freeze(others, False)
        return steps * BATCH / (time.perf_counter() - start)

    return {"vaedist fit": whole, "bare step": bare}


def _freeze(parameters: list[Any], frozen: bool) -> None:
    for one in parameters:
        one.requires_grad_(not frozen)


WARM = 10
"""Steps of the hand-written loop before the clock starts."""
