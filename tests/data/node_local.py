"""What tests of a node's own disk share: what lies on it, what is read from it, and other processes that use it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import ROOT
from vaedist.data.format.index import Index
from vaedist.data.loading.stream import (
    EvaluationStream,
    EvaluationStreamConfig,
    TrainingStream,
    TrainingStreamConfig,
)

SPLITS = {"train": [5, 7, 4], "validate": [6], "test": [3]}
BOTH = ("train", "validate")


def the_set(place: Path) -> Path:
    [folder] = [one for one in (place / f"vaedist-{os.getuid()}").iterdir() if one.is_dir()]
    return folder


def copies(folder: Path) -> dict[str, tuple[int, int]]:
    """Name to inode and time of change of every copy."""
    found = (path for path in folder.iterdir() if path.suffix in (".tar", ".cols"))
    return {path.name: (path.stat().st_ino, path.stat().st_ctime_ns) for path in found}


def seen(index: Index) -> list[Any]:
    """What training sees in two epochs, and what validation sees."""
    stream = TrainingStream(index, "train", TrainingStreamConfig(batch_size=4, seed=3))
    with contextlib.closing(stream):
        batches = stream.batches()
        rows = [next(batches) for _ in range(2 * stream.steps_per_epoch)]
    with contextlib.closing(
        EvaluationStream(index, "validate", EvaluationStreamConfig(batch_size=4))
    ) as held_out:
        rows += list(held_out)
    return [(batch["key"], batch["label"].tolist(), batch["image"].tolist()) for batch in rows]


def is_copied(index: Index, place: Path) -> bool:
    return all(place in shard.tar.parents for name in BOTH for shard in index.split(name).shards)


ONE = """
import json, logging, sys, time
from pathlib import Path
from vaedist.data.format.index import Index
from vaedist.data.loading.staging import stage_shards

logging.basicConfig(stream=sys.stdout, format="%(message)s")
folder, gate, hold = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
blocks = 0

def report(line):
    print(line, flush=True)
    while hold == "copying" in line and not gate.exists():
        time.sleep(0.01)

def stopped():
    global blocks
    blocks += 1
    while hold == "torn" and blocks > 5 and not gate.exists():  # asked once for each of eight files
        print("half way", flush=True)
        time.sleep(60)
    return False

with stage_shards(Index.open(folder), ("train", "validate"), report=report, stopped=stopped) as near:
    print("staged" if near.split("train").shards[0].original else "shared", flush=True)
    while hold == "using" and not gate.exists():
        time.sleep(0.01)
"""


@contextlib.contextmanager
def another(index: Index, gate: Path, hold: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that stages; it stops at `hold` until the file `gate` exists."""
    process = subprocess.Popen(
        [sys.executable, "-c", ONE, str(index.folder), str(gate), hold],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return
    pytest.fail(f"it ended before it said {word!r}")
