"""A stage for one fault: a run in real processes, which can be stopped at a step and hurt, and what must be true after.

Each stage has its own temporary folder and marks its processes in their environment, so that what a run leaves
behind is found although other programs work on this machine at the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
import yaml

from tests.run_commands import BODY, ROOT, Training, curve, last_step

INSIDE = Path(__file__).parent / "inside"
STEPS, SAVE = 30, 5
BUSY = 4
"""Deadlines are for an idle machine; a busy one gets so many times as long."""


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def job(data: Path, **train: Any) -> dict[str, Any]:
    """A job that logs every step and saves every fifth."""
    settings = {
        "steps": STEPS,
        "batch_size": 8,
        "threads": 1,
        "log_every": 1,
        "validate_every": 10,
        "save_every": SAVE,
        "ema_half_life": 100,
        "optim": {"main": {"learning_rate": 2e-3, "schedule": {"kind": "cosine", "warmup": 5}}},
    }
    model = {"kind": "witness", "encoder": BODY, "latent": 4}
    return {
        "name": "faults",
        "seed": 3,
        "data": {"path": str(data), "cache": "none"},  # damage is met by a step, not while a cache is filled
        "model": model,
        "train": settings | train,
    }


class Stage:
    """One run and its surroundings.

    Args:
        folder: Where all of it goes.
        note: Takes a measured value of the row by name.
    """

    def __init__(self, folder: Path, data: Path, note: Callable[[str, object], None]) -> None:
        self.folder, self.data, self.note = folder, data, note
        self.run, self.temp, self.witness = folder / "run", folder / "tmp", folder / "witness"
        for made in (self.temp, self.witness):
            made.mkdir(parents=True)
        self.mark = uuid.uuid4().hex
        self.job = folder / "job.yaml"
        self.write_job()
        self._shared_memory = set(os.listdir("/dev/shm"))
        self._began = self._seen_before()

    def write_job(self, **train: Any) -> None:
        self.job.write_text(yaml.safe_dump(job(self.data, **train)))

    def begin_with(self, half: Stage) -> None:
        """Take over a copy of another stage's run, as it stood when that was killed."""
        shutil.copytree(half.run, self.run)
        gates = shutil.ignore_patterns("held-*", "holding-*")
        shutil.copytree(half.witness, self.witness, dirs_exist_ok=True, ignore=gates)

    # Running --------------------------------------------------------------------------------------------------

    def environment(self, hold: int | None = None, **more: str) -> dict[str, str]:
        """For a process of this stage; with `hold` every rank waits before that step, once."""
        held = {} if hold is None else {"WITNESS_HOLD": str(hold)}
        return {
            "TMPDIR": str(self.temp),
            "VAEDIST_STAGE": self.mark,
            "WITNESS": str(self.witness),
            "PYTHONPATH": f"{INSIDE}{os.pathsep}{ROOT}",
            **held,
            **more,
        }

    def start(
        self, *arguments: str, hold: int | None = None, run: Path | None = None, **more: str
    ) -> Training:
        """The door, in the background."""
        self.now()
        return Training(
            self.job, run or self.run, *arguments, environment=self.environment(hold=hold, **more)
        )

    def train(self, *arguments: str, **more: Any) -> Ended:
        """The door, to its end."""
        with self.start(*arguments, **more) as training:
            return Ended(*training.end(600 * BUSY))

    def go_on(self, *arguments: str, **more: Any) -> Ended:
        """The same command again, to its end; notes how long it takes until it trains."""
        since = time.monotonic()
        with self.start(*arguments, **more) as training:
            self.note("recovery", self.until_training(training, since))
            return Ended(*training.end(600 * BUSY))

    def wait_held(self, training: Training, ranks: int = 1) -> None:
        """Until all ranks wait before the chosen step, and the checkpoints before it are written."""
        gates = [self.witness / f"holding-{rank}" for rank in range(ranks)]
        training.wait_until(lambda: all(gate.exists() for gate in gates), 300 * BUSY, "reach the step")
        due = last_step(self.run) // SAVE * SAVE
        saved = self.run / "checkpoints" / f"step-{due:09d}"
        training.wait_until(lambda: not due or saved.exists(), 60 * BUSY, "save")
        training.wait_until(lambda: not list(self.run.glob("checkpoints/.tmp-*")), 60 * BUSY, "prune")
        self.now()

    def now(self) -> None:
        """What `until_training` counts from."""
        self._began = self._seen_before()

    def release(self) -> None:
        for gate in self.witness.glob("holding-*"):
            gate.unlink()

    def until_training(self, training: Training, since: float) -> float:
        """Seconds from `since` until the attempt after the present one has trained a step."""
        starts, inode, step = self._began

        def again() -> bool:
            with contextlib.suppress(OSError, ValueError):
                record = json.loads((self.run / "provenance.json").read_bytes())
                first = record[-1]["start_step"]
                # The record of a start comes just before what was logged beyond it is cut away.
                cut = step <= first or (self.run / "metrics.jsonl").stat().st_ino != inode
                return len(record) != starts and cut and last_step(self.run) > first
            return False

        training.wait_until(again, 300 * BUSY, "train again")
        return round(time.monotonic() - since, 2)

    def _seen_before(self) -> tuple[int, int, int]:
        """Number of starts, inode of the rows, last step: how a new attempt is told from what was there."""
        starts = inode = 0
        with contextlib.suppress(OSError, ValueError):
            starts = len(json.loads((self.run / "provenance.json").read_bytes()))
        with contextlib.suppress(OSError):
            inode = (self.run / "metrics.jsonl").stat().st_ino
        return starts, inode, last_step(self.run)

    # What must be true ------------------------------------------------------------------------------------------

    def starts(self) -> list[int]:
        """The step that each attempt began at."""
        return [entry["start_step"] for entry in json.loads((self.run / "provenance.json").read_bytes())]

    def saved(self) -> list[str]:
        return sorted(path.name for path in (self.run / "checkpoints").iterdir())

    def newest(self) -> Path:
        return sorted((self.run / "checkpoints").glob("step-*"))[-1]

    def keys(self) -> dict[int, list[str]]:
        """By step: the keys of the global batch; all attempts must have seen the same."""
        rows: dict[int, dict[int, str]] = {}
        for path in sorted(self.witness.glob("seen-*.jsonl")):
            for line in path.read_text().splitlines():
                seen = json.loads(line)
                if "step" in seen:
                    for place, key in enumerate(seen["keys"], seen["start"]):
                        before = rows.setdefault(seen["step"], {}).setdefault(place, key)
                        assert before == key, f"step {seen['step']} saw {key} where it had seen {before}"
        return {step: [key for _, key in sorted(places.items())] for step, places in sorted(rows.items())}

    def equals(self, whole: Stage) -> None:
        """The finished run is bit for bit that of a stage without fault: rows, weights, and samples by step."""
        assert curve(self.run) == curve(whole.run)
        assert difference(state(self.run), state(whole.run)) == []
        assert self.keys() == whole.keys()
        assert json.loads((self.run / "finished.json").read_bytes())["step"] == STEPS

    def is_clean(self) -> None:
        """No process, socket, shared memory or temporary file is left, wherever the run was left off."""
        deadline = time.monotonic() + 10
        while (left := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == [], "processes are left"
        # torch makes this empty folder, one for each user and for good, whenever an optimizer is made.
        torchs = {path for path in self.temp.glob("torchinductor_*") if not list(path.iterdir())}
        assert set(self.temp.iterdir()) <= torchs, "temporary files are left"
        sockets = [path for path in self.folder.rglob("*") if stat.S_ISSOCK(path.lstat().st_mode)]
        assert sockets == []
        new = {f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - self._shared_memory}
        assert new - _open_files() == set(), "shared memory is left that nobody holds"
        ours = re.compile(r"\.tmp-|\.lock|lock$|\.ray$|stop$|\.stop")
        runs = [path for path in self.folder.glob("*") if (path / "job.yaml").exists()]
        for folder in (place for run in runs for place in (run, run / "checkpoints")):
            assert [path.name for path in folder.iterdir() if ours.match(path.name)] == []

    def _processes(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("VAEDIST_STAGE") == self.mark and process.pid != os.getpid():
                    found.append(" ".join(process.cmdline()))
        return found


def state(run: Path, steps: int = STEPS) -> dict[str, Any]:
    """What the newest checkpoint holds, without where the data lie."""
    found = torch.load(sorted((run / "checkpoints").glob("step-*"))[-1] / "state.pt", weights_only=True)
    assert found["step"] == steps
    return {name: found[name] for name in ("model", "ema", "optim", "sched", "progress", "collapse")}


def difference(one: Any, other: Any, where: str = "") -> list[str]:
    """Places where two states differ in a single bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in difference(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [place for number, pair in pairs for place in difference(*pair, f"{where}[{number}]")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) and one.dtype == other.dtype else [where]
    return [] if one == other else [where]


def _open_files() -> set[str]:
    """Everything that a living process has open or mapped."""
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found |= {os.readlink(link) for link in (process / "fd").iterdir()}
            found |= {line.split()[-1] for line in (process / "maps").read_text().splitlines() if "/" in line}
    return found


def needs(*command: str) -> None:
    """Run what only root may; skip where it is not allowed."""
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root's rights on this machine: {' '.join(command[:3])} failed ({error})")


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be made or removed in `folder`, not even by root."""
    needs("chattr", "+i", str(folder))
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(folder)], check=True)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    needs("mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def shard(stage: Stage, *arguments: str) -> Ended:
    """`vaedist-shard`, to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "vaedist.shard", *arguments],
        cwd=ROOT,
        env=os.environ | stage.environment(),
        capture_output=True,
        text=True,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def only_line(err: str) -> str:
    """The one line on standard error: what a user is told."""
    assert err.count("\n") == 1, err
    return err.strip()


KILLED = -signal.SIGKILL
