"""Share of the training time in which a job waited for data, by the loop's own counter (`data_wait`): the limit is 0.

Each file of jobs/ that reads images, on phantoms of the size that its header packs, with its own batch; without the
logging, validation and saving that fall between. The first epoch is read too: nothing is left out but the first line
of the log, which holds the start of the readers.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Question, Rate, packed

SHIPPED = Path(__file__).resolve().parents[2] / "jobs"
SIZES = {"mnist": 28, "mnist50k": 28, "oasis": 256}
"""Side of an image where a job's header packs it as it is, by the folder."""
LARGE = 128
"""Pixels from which a step takes long enough to need few of them."""
FEW, MANY = 640, 6_000
"""Large images of a split, and small ones: with few, a step bears more of an epoch's start than in the job."""


def questions(folder: Path, _asked: argparse.Namespace) -> Iterator[Question]:
    yield Question("Share of a training step that waits for data", "%", jobs(folder))


def jobs(folder: Path) -> dict[str, Rate]:
    """A contestant for each job that reads images."""
    found = {}
    for path in sorted(SHIPPED.glob("*.yaml")):
        if side := side_of(path.read_text()):
            found[path.stem] = share(path, packed(folder, size=side, train=FEW if side >= LARGE else MANY))
    return found


def side_of(job: str) -> int | None:
    """Pixels along the images that a job file reads; None where it reads codes."""
    command = re.search(r"vaedist-shard .*--out shards/\w+.*", job)
    if "tokenizer:" in job or command is None:
        return None
    asked = re.search(r"--size (\d+)", command[0])
    kept = re.search(r"--out shards/(\w+)", command[0])
    assert kept is not None
    return int(asked[1]) if asked else SIZES[kept[1]]


def share(path: Path, shards: Path) -> Rate:
    import torch

    from vaedist.config.job import load_job
    from vaedist.data.format.index import Index
    from vaedist.distributed.process_group import Group
    from vaedist.runs.fit_options import FitOptions
    from vaedist.training.loop import fit

    every = 4 if Index.open(shards).shape[1] >= LARGE else 20
    steps = 4 * every
    overrides = [f"train.{name}={steps}" for name in ("steps", "validate_every", "save_every")]
    overrides += ["train.epochs=null", f"train.log_every={every}", f"data.path={shards}", "init_from=null"]
    job = load_job(path, overrides)

    def percent() -> float:
        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as scratch:
            run = Path(scratch) / "run"
            fit(job, run, group=Group.join("cpu"), options=FitOptions(quiet=True))
            torch.set_num_threads(threads)
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return 100 * statistics.mean(
            row["data_wait"] for row in [one for one in rows if one["kind"] == "train"][1:]
        )

    return percent
