"""Small training runs in real processes: how tests start them, watch them, signal them and compare them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import yaml

from vaedist.config.job import Job
from vaedist.config.settings import parse
from vaedist.runs.stop_request import POLL_SECONDS

ROOT = Path(__file__).parents[1]
BODY = {"kind": "conv", "width": 8, "depth": 1, "downsample": 4}
MODELS: dict[str, dict[str, Any]] = {
    "vae": {"kind": "vae", "encoder": BODY, "latent": 4},
    "vqvae": {"kind": "vqvae", "encoder": BODY, "codebook": {"kind": "ema", "codes": 16, "dim": 4}},
}
CLOCK = {"time", "images_per_second", "data_wait"}
"""Columns of metrics.jsonl that tell the time of day or how busy the machine was."""


def small_job(data: Path, model: str = "vae", **train: Any) -> Job:
    """A job on a packed phantom that logs every step."""
    settings: dict[str, Any] = {
        "batch_size": 8,
        "threads": 1,
        "log_every": 1,
        "validate_every": 20,
        "save_every": 5,
        "ema_half_life": 100,
        "optim": {"main": {"learning_rate": 2e-3, "schedule": {"kind": "cosine", "warmup": 5}}},
    }
    content = {"name": "small", "seed": 3, "data": {"path": str(data)}, "model": MODELS[model]}
    return parse(Job, {**content, "train": settings | train}, where="the test's job")


def write_job(path: Path, job: Job) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    return path


def curve(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, without the clock's columns."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def last_step(run: Path) -> int:
    """The last step that metrics.jsonl tells of, while the run may be writing it."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except json.JSONDecodeError:
            continue  # half written
    return 0


@contextlib.contextmanager
def held(*ranks: psutil.Process) -> Iterator[None]:
    """These stand still, the first rank among them: a stop file written meanwhile is seen at their next step.

    A run looks for one once a second, in which a short run would be over.
    """
    for one in ranks:
        one.suspend()
    try:
        yield
        time.sleep(1.1 * POLL_SECONDS)
    finally:
        for one in ranks:
            one.resume()


def load_tool(name: str) -> ModuleType:
    """A program of `tools` as a module, which has no name that Python could import."""
    sys.path.insert(0, str(ROOT / "tools"))  # where it finds what tools share, as when it is run
    loader = SourceFileLoader(f"tool_{name}", str(ROOT / "tools" / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # where its dataclasses look for their annotations
    loader.exec_module(module)
    return module


class Training:
    """`vaedist-train` in a process of its own; a context manager that leaves no process behind."""

    def __init__(
        self, job: Path, run: Path, *arguments: str, environment: dict[str, str] | None = None
    ) -> None:
        self.run = run
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vaedist.train", str(job), "--run-dir", str(run), *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.family = psutil.Process(self.process.pid)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        left = self.everyone()
        for one in left:
            one.kill()
        self.process.communicate()
        psutil.wait_procs(left)

    def everyone(self) -> list[psutil.Process]:
        """The launcher, if it lives, and all that it started."""
        try:
            return [self.family, *self.family.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def rank(self, number: int) -> psutil.Process:
        """The process of one rank; the launcher itself where it started none."""
        for child in self.family.children():
            if child.environ().get("RANK") == str(number):
                return child
        assert number == 0, f"no process is rank {number}"
        return self.family

    def wait_for_step(self, step: int, timeout: float = 240.0) -> None:
        self.wait_until(lambda: last_step(self.run) >= step, timeout, f"reach step {step}")

    def wait_until(self, reached: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not reached():
            assert self.process.poll() is None, (
                f"it ended before it could {what}:\n{self.process.communicate()}"
            )
            assert time.monotonic() < deadline, f"it did not {what} within {timeout:.0f} s"
            time.sleep(0.01)

    def end(self, timeout: float = 240.0) -> tuple[int, str, str]:
        """Exit code, standard output and standard error, once it has ended by itself."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def signal(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to a rank, or to the launcher."""
        (self.family if rank is None else self.rank(rank)).send_signal(number)


def train(
    job: Path, run: Path, *arguments: str, environment: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """Run `vaedist-train` to its end: exit code, standard output, standard error."""
    with Training(job, run, *arguments, environment=environment) as training:
        return training.end()
