"""What the driver prints of a Ray Train run: rank 0's lines, losses, resizes, recoveries, and waiting for resources.

The workers and Ray's controller append lines to files in the attempt's work folder, which every node sees; the driver
reads what is new a few times a second.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vaedist.core.errors import UserError, WorkerLost
from vaedist.launchers.ray.cluster import ResourceRequest, free_cpus, nodes
from vaedist.launchers.recovery import Recovery

_GONE_SECONDS = 60.0
"""How long a cluster may be too small for a run before the run gives up: a node that is restarted comes back."""


PROGRAMMING_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(NameError, NotImplementedError, TypeError, ValueError),
)
"""Never caused by the death of another rank, which torch reports as another RuntimeError or as an OSError."""

STALLS_FILE = "stuck.jsonl"
"""File in the work folder: reports of workers whose training thread stalled."""


class Tail:
    """What has been added to a file since the last read; only whole lines."""

    def __init__(self, path: Path) -> None:
        self._path, self._seen, self._rest = path, 0, b""

    def text(self) -> bytes:
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._seen)
            added = file.read()
            self._seen += len(added)
            return added
        return b""

    def messages(self) -> list[dict[str, Any]]:
        *lines, self._rest = (self._rest + self.text()).split(b"\n")
        return [json.loads(line) for line in lines]


class DriverLog:
    """Prints what happens in the workers."""

    def __init__(
        self,
        work: Path,
        request: ResourceRequest,
        max_failures: int,
        hang_seconds: float,
        *,
        private: bool,
        quiet: bool,
    ) -> None:
        self._console, self._losses = Tail(work / "console.txt"), Tail(work / "losses.jsonl")
        self._stages, self._stuck = Tail(work / "stages.jsonl"), Tail(work / STALLS_FILE)
        self.stuck: dict[int, str] = {}
        """By rank: why it ended, in the group that was last started."""
        self._request, self._max_failures, self._hang_seconds = request, max_failures, hang_seconds
        self._private, self._quiet = private, quiet
        self._failures = 0
        self._recovery = Recovery("Ray's restart")
        self._waiting_since: float | None = time.monotonic()
        self._too_small_since: float | None = None
        self._checked, self._queue_reported = time.monotonic(), False
        self.world = 0
        """Workers of the group that was last started."""

    def look(self) -> None:
        """Print what is new.

        Raises:
            UserError: the cluster has been too small for the run for a minute.
        """
        sys.stdout.write(self._console.text().decode(errors="replace"))
        sys.stdout.flush()
        now = time.monotonic()
        for message in self._stuck.messages():
            self.stuck[message["rank"]] = message["report"]
        for message in self._losses.messages():
            self._on_lost(message["lost"], now)
        for message in self._stages.messages():
            self._on_stage(message["reached"], message["world"], now)
        if self._waiting_since is not None and now - self._checked > 5:
            self._checked = now
            self._check_room(now - self._waiting_since, now)

    def _on_lost(self, lost: dict[str, list[str]], now: float) -> None:
        self._waiting_since = now
        cause = find_lost_rank(lost, self._hang_seconds)
        if cause is None:
            return  # an error with a name, or a bug: `run` is about to raise it
        reason = f"rank {cause[0]} of {self.world} {cause[1]}"
        if self.stuck:
            reason = next(iter(self.stuck.values()))
        self._failures += 1
        self._recovery.on_lost(now)
        if self._failures <= self._max_failures:
            print(
                f"vaedist: {reason}; starting again from the last checkpoint "
                f"({self._failures} of at most {self._max_failures} times)",
                file=sys.stderr,
                flush=True,
            )

    def _on_stage(self, stage: str, world: int, now: float) -> None:
        if stage == "started":
            if self.world not in (0, world):
                print(
                    f"vaedist: {self.world} workers became {world}, for which the cluster has room now: going on from "
                    "the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
            self.world = world
            self.stuck.clear()
            self._waiting_since = self._too_small_since = None
        message = self._recovery.on_stage(stage, now)
        if message and not self._quiet:
            print(message, flush=True)

    def _check_room(self, seconds: float, now: float) -> None:
        """While no group is running: say what is missing, and give up where it can never come."""
        try:
            self._request.fit(nodes())
        except UserError:
            self._too_small_since = self._too_small_since or now
            if now - self._too_small_since > _GONE_SECONDS:
                raise
            return
        self._too_small_since = None
        if not self._private and seconds > 20 and not self._queue_reported and not self._quiet:
            self._queue_reported = True
            print(f"waiting for room in the cluster: {free_cpus()} CPUs are free", flush=True)


def find_lost_rank(lost: dict[str, list[str]], hang_seconds: float) -> tuple[int, str] | None:
    """The rank that was lost first, and how: deaths cause errors in other ranks. None: an error with a name or a bug,
    which would occur again.

    Args:
        lost: By rank, the names of the error's classes and of those of the error that it wraps.
    """
    causes = {
        "WorkerHealthCheckTimeoutError": f"gave no sign of life for {hang_seconds:.0f} s and was killed",
        "RayActorError": "died (killed, or out of memory)",
    }
    for kind, cause in causes.items():
        for rank, names in lost.items():
            if kind in names:
                return int(rank), cause
    final = {"UserError", *(kind.__name__ for kind in PROGRAMMING_ERRORS)}
    if any(final & set(names) for names in lost.values()):
        return None
    rank = min(lost, key=int)
    return int(rank), f"failed ({lost[rank][0]})"


def error_names(error: Exception) -> list[str]:
    """Names of the classes of an error, and of the error that it wraps."""
    inner = getattr(error, "health_check_failure", None)
    return [base.__name__ for kind in (error, inner) for base in type(kind).__mro__]


def as_user_error(error: Exception, world: int, stuck: Mapping[int, str]) -> Exception:
    """Ray's error as ours: a lost worker is a UserError, anything else a bug with its traceback.

    Args:
        stuck: By rank, the reports of stalled training threads.
    """
    used_up = "and the allowed failures are used up; the same command continues from the last checkpoint"
    if isinstance(error, UserError):
        return error
    if stuck:
        return WorkerLost(f"{next(iter(stuck.values()))}, {used_up}")
    for rank, failure in getattr(error, "worker_failures", {}).items():
        if {"RayActorError", "WorkerHealthCheckTimeoutError"} & set(error_names(failure)):
            return WorkerLost(
                f"rank {rank} of {world} died (killed, out of memory, or without a sign of life), {used_up}"
            )
    if type(getattr(error, "controller_failure", None)).__name__ == "WorkerGroupStartupTimeoutError":
        return UserError(
            "Ray found no room for the workers for a long time: others use the cluster; run the same command again "
            "later, or start fewer workers"
        )
    return RuntimeError(f"Ray Train failed\n{error}")
