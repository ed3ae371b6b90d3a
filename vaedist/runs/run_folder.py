"""The run folder: its files, the record of each start, and the cut that lets each step appear once.

    runs/NAME/                     0700: medical images are private
      job.yaml                     the job, every default filled in
      provenance.json              one entry per start: version, git commit, libraries, command, host, changes
      checkpoints/, best.json      see `vaedist.runs.checkpoint`
      lock                         see `vaedist.runs.run_lock`
      metrics.jsonl, metrics.csv, tensorboard/  see `vaedist.training.run_log`; each step appears once
      latents.jsonl, collapse.json what each latent dimension carries: see `vaedist.training.validation_figures`
      figures/                     curves.png, validation-STEP.png and what the doors draw
      finished.json                only once there is nothing left to do

What a killed run logged beyond its last checkpoint will be logged again, so `cut` takes it away first: rows of
metrics.jsonl and latents.jsonl, pictures of later validations, and whole records of TensorBoard's event files, which a
mere `purge_step` would only hide.

Nothing here needs torch: a launcher makes the folder and holds its lock without it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import shlex
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import vaedist
from vaedist.config.job import Job
from vaedist.core.errors import UserError
from vaedist.core.files import as_json, disk_errors, replace_file

log = logging.getLogger("vaedist")

_MAY_BE_THERE = re.compile(r"\.|lock|stop$|stuck|ray|.*\.(?:log|out|err)$")
"""What a folder may hold before a run has begun in it: a start that failed, or the log of the job that trains in it."""
_TIME_IN_NAME = re.compile(r"\.\d{10}\.")
_LIBRARIES = (
    "torch",
    "numpy",
    "ray",
    "optuna",
    "webdataset",
    "pydantic",
    "pillow",
    "scikit-image",
    "tensorboard",
)


class Absent:
    def __repr__(self) -> str:
        return "not set"


ABSENT = Absent()


class Change(NamedTuple):
    """One setting that differs between the saved and the asked job."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} was {_shown(self.old)} and is now {_shown(self.new)}"


def _shown(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


class RunFolder:
    """The files of one run. Only the holder of its lock writes."""

    def __init__(self, path: Path, *, fresh: bool = False, parents: Sequence[Path] = ()) -> None:
        self.path, self.fresh, self._parents = path, fresh, parents
        self.tensorboard = path / "tensorboard"
        self.metrics = path / "metrics.jsonl"
        self.table = path / "metrics.csv"
        self.latents = path / "latents.jsonl"
        self.collapse = path / "collapse.json"
        self.figures = path / "figures"
        self.stop = path / "stop"

    @classmethod
    def make(cls, path: str | Path, *, new_run: bool = False) -> RunFolder:
        """The run folder at `path`, made (0700) if missing.

        Args:
            new_run: Never continue: where `path` holds a run already, a fresh `path-2` (or 3, ...) is made.
        """
        wanted = Path(path).expanduser()
        try:
            parents = [place for place in wanted.parents if not place.exists()]  # innermost first
            wanted.parent.mkdir(parents=True, exist_ok=True)
            number = 1
            while True:
                place = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
                fresh = True
                try:
                    place.mkdir(mode=0o700)
                except FileExistsError:
                    fresh = False
                    if not place.is_dir():
                        raise
                    if new_run and (number > 1 or cls(place).has_run):
                        number += 1
                        continue
                    if not any(place.iterdir()):
                        place.chmod(0o700)
                return cls(place, fresh=fresh, parents=parents)
        except OSError as error:
            reason = error.strerror
            raise UserError(
                f"cannot make the run folder {wanted}: {reason}; choose another --run-dir"
            ) from None

    def discard(self) -> None:
        """Take the folder away again if it was made for a start that wrote nothing into it, and so its parents."""
        if self.fresh:
            with contextlib.suppress(OSError):
                (self.path / "checkpoints").rmdir()
            with contextlib.suppress(OSError):  # not empty: something was written
                for place in (self.path, *self._parents):
                    place.rmdir()

    def refuse_strangers(self, ours: str) -> None:
        """Refuse a folder that holds something else than what is to be continued in it.

        Args:
            ours: `job.yaml` of a run, or `trials.jsonl` of a search: what tells that the folder is one.

        Raises:
            UserError: it holds the other one, packed data, or files that are not ours.
        """
        told = {"job.yaml": "a training run", "trials.jsonl": "a search", "index.json": "packed data"}
        names = [] if self.fresh else sorted(path.name for path in self.path.iterdir())
        if ours in names:
            return
        what = next((told[name] for name in told if name in names), None)
        if what is None and not self.has_run:
            strange = [name for name in names if not _MAY_BE_THERE.match(name)]
            what = f"{strange[0]!r}, which is not of a run" if strange else None
        if what is not None:
            raise UserError(f"{self.path} holds {what}: give a new folder with --run-dir")

    @property
    def has_run(self) -> bool:
        """Whether training has begun in this folder."""
        return (self.path / "job.yaml").exists() or (self.path / "checkpoints").exists()

    def begin(
        self,
        job: Job,
        *,
        step: int | None,
        beginning: Mapping[str, Any] | None = None,
        changed: Sequence[Change] = (),
        engine: str = "local",
        world: int = 1,
        attempt: str = "",
        command: Sequence[str] | None = None,
    ) -> None:
        """Write down a start: the resolved job, who starts it, and cut what was logged beyond `step`.

        Args:
            job: Resolved (`vaedist.runs.open_run.resolved`).
            step: The checkpoint's step; None: there is none and the run starts from nothing.
            beginning: How it starts (`vaedist.training.initialization`): `how`, and the other runs whose weights it
            takes. changed: From `vaedist.runs.open_run.resume`.
            command: The command line, where it is not this process's own.
        """
        with disk_errors("the record of this start", self.path):
            for folder in (self.tensorboard, self.figures):
                folder.mkdir(mode=0o700, exist_ok=True)
            (self.path / "finished.json").unlink(missing_ok=True)
            entry = provenance(command) | {
                "attempt": attempt,
                "start_step": step or 0,
                "start": dict(beginning or {}),
                "engine": engine,
                "workers": world,
                "changed": [{"key": c.key, "old": _plain(c.old), "new": _plain(c.new)} for c in changed],
            }
            self.write_job(job)
            replace_file(self.path / "provenance.json", as_json([*self._starts_before(), entry]))
            self.cut(step)

    def write_job(self, job: Job) -> None:
        """`job.yaml`: the job, resolved by the caller; vaedist-train takes it as it is."""
        text = yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        header = "# Written by vaedist-train: the job of this run, every default filled in.\n"
        replace_file(self.path / "job.yaml", (header + text).encode())

    def starts(self) -> list[dict[str, Any]]:
        """The entries of provenance.json, oldest first."""
        try:
            content = json.loads((self.path / "provenance.json").read_bytes())
        except FileNotFoundError:
            return []
        except ValueError:
            content = None
        if not isinstance(content, list):
            raise UserError(
                f"{self.path / 'provenance.json'} is damaged: remove it (its record is lost) and go on"
            )
        return content

    def _starts_before(self) -> list[dict[str, Any]]:
        """`starts`; a record that cannot be read is put aside and must not keep the run from going on."""
        try:
            return self.starts()
        except UserError:
            record = self.path / "provenance.json"
            aside = next(
                place
                for number in itertools.count(1)
                if not (place := self.path / f"damaged-{number}-{record.name}").exists()
            )
            record.rename(aside)
            log.warning(
                "%s cannot be read: put aside as %s, and a new record of starts begins", record, aside.name
            )
            return []

    def finish(self, step: int, reason: str, metrics: Mapping[str, float]) -> None:
        """Record that there is nothing left to do: `reason` is `length` or `early stop`."""
        content = {"step": step, "reason": reason, "metrics": _finite(metrics)}
        with disk_errors("finished.json", self.path):
            replace_file(self.path / "finished.json", as_json(content))

    def finished(self) -> dict[str, Any] | None:
        """What `finish` recorded last: `step`, `reason`, `metrics`."""
        try:
            content: dict[str, Any] = json.loads((self.path / "finished.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return content

    def cut(self, step: int | None) -> None:
        """Take away what was logged beyond `step` (None: everything), so that each step appears once."""
        last = -1 if step is None else step
        for path in (self.metrics, self.latents):
            if path.exists():
                rows = path.read_bytes().splitlines(keepends=True)
                kept = [row for row in rows if _row_step(row) <= last]
                if kept != rows:
                    replace_file(path, b"".join(kept))
        for picture in self.figures.glob("validation-*.png"):
            of_step = picture.stem.removeprefix("validation-")
            if of_step.isdecimal() and int(of_step) > last:
                picture.unlink()
        attempts = sorted(
            (found, path) for path in self.tensorboard.glob("*tfevents*") for found in _cut_events(path, last)
        )
        # TensorBoard reads files by name, which begins with the time of a clock: the next attempt's may be behind.
        for number, (_, path) in enumerate(attempts):
            path.replace(path.with_name(_TIME_IN_NAME.sub(f".{number:010d}.", path.name, count=1)))


def provenance(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Where numbers come from: version, git commit, libraries, command line, machine."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "vaedist": vaedist.__version__,
        "git_commit": git_commit(),
        "libraries": _libraries(),
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "command": shlex.join(sys.argv if command is None else command),
    }


@functools.cache
def git_commit() -> str | None:
    """Commit of the source tree that runs, with `-dirty` for changed files; None for an installed package."""
    tree = Path(vaedist.__file__).resolve().parents[1]
    if not (tree / ".git").exists():
        return None
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def libraries() -> str:
    """One line: vaedist, its commit, Python and the libraries that numbers depend on."""
    found = {"vaedist": vaedist.__version__, "commit": git_commit(), "Python": platform.python_version()}
    return ", ".join(f"{name} {version}" for name, version in (found | _libraries()).items() if version)


@functools.cache
def _libraries() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _plain(value: Any) -> Any:
    return None if value is ABSENT else value


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(value) if abs(value) < float("inf") else None for name, value in metrics.items()}


def _row_step(row: bytes) -> float:
    """The step of a row of metrics.jsonl; infinite for one that a kill has torn."""
    try:
        return float(json.loads(row)["step"]) if row.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _cut_events(path: Path, last: int) -> list[int]:
    """Drop records beyond step `last` from one TensorBoard event file, or the file if nothing is left to show.

    A record is: length (u64), its checksum (u32), that many bytes of an Event message, their checksum (u32), all
    little-endian. Records are kept or dropped whole, so no checksum changes; a torn tail is dropped.

    Returns:
        The last step that is left, if any.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event

    content = path.read_bytes()
    kept, steps = [], []
    start = 0
    while start + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        stop = start + 12 + length + 4
        if stop > len(content):
            break
        try:
            event = Event.FromString(content[start + 12 : stop - 4])
        except DecodeError:
            break
        if event.step <= last:
            kept.append(content[start:stop])
            if event.HasField("summary"):
                steps.append(event.step)
        start = stop
    if not steps:
        path.unlink()
    elif sum(map(len, kept)) < len(content):
        replace_file(path, b"".join(kept))
    return [max(steps)] if steps else []
