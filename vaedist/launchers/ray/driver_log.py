"""What the driver tells of a Ray Train run: rank 0's lines, losses, resizes, where a recovery's time went, and queues.

The workers and Ray's controller write lines into files of the attempt's work folder, which every node sees; the
driver looks at them a few times a second.
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


BUGS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(NameError, NotImplementedError, TypeError, ValueError),
)
"""Never the echo of another rank's end, which torch tells as another RuntimeError or as an OSError."""

STUCK = "stuck.jsonl"
"""File in the work folder: the last sentence of a worker that ended because its training thread stood still."""


class Tail:
    """What has been added to a file since the last look; lines are handed out whole."""

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
    """Tells the user what happens in the workers: rank 0's console, losses, resizes, recoveries, and a long queue."""

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
        self._stages, self._stuck = Tail(work / "stages.jsonl"), Tail(work / STUCK)
        self.stuck: dict[int, str] = {}
        """By rank: why it ended, in the group that was last started."""
        self._request, self._max_failures, self._hang_seconds = request, max_failures, hang_seconds
        self._private, self._quiet = private, quiet
        self._failures = 0
        self._recovery = Recovery("Ray's restart")
        self._waiting_since: float | None = time.monotonic()
        self._too_small_since: float | None = None
        self._checked, self._told_queue = time.monotonic(), False
        self.world = 0
        """Workers of the group that was last started."""

    def look(self) -> None:
        """Show what is new.

        Raises:
            UserError: the cluster has become too small for the run, for a minute.
        """
        sys.stdout.write(self._console.text().decode(errors="replace"))
        sys.stdout.flush()
        now = time.monotonic()
        for message in self._stuck.messages():
            self.stuck[message["rank"]] = message["told"]
        for message in self._losses.messages():
            self._lost(message["lost"], now)
        for message in self._stages.messages():
            self._reached(message["reached"], message["world"], now)
        if self._waiting_since is not None and now - self._checked > 5:
            self._checked = now
            self._waits(now - self._waiting_since, now)

    def _lost(self, lost: dict[str, list[str]], now: float) -> None:
        told = blame(lost, self._hang_seconds)
        self._waiting_since = now
        if told is None:
            return  # an error with a name, or a bug: `run` is about to tell it
        rank, how = told
        who = f"rank {rank} of {self.world} {how}"
        if self.stuck:
            who = next(iter(self.stuck.values()))
        self._failures += 1
        self._recovery.on_lost(now)
        if self._failures <= self._max_failures:
            print(
                f"vaedist: {who}; starting again from the last checkpoint "
                f"({self._failures} of at most {self._max_failures} times)",
                file=sys.stderr,
                flush=True,
            )

    def _reached(self, stage: str, world: int, now: float) -> None:
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
        told = self._recovery.on_stage(stage, now)
        if told and not self._quiet:
            print(told, flush=True)

    def _waits(self, seconds: float, now: float) -> None:
        """No group is running: say what is missing, and give up where it can never come."""
        try:
            self._request.fit(nodes())
        except UserError:
            self._too_small_since = self._too_small_since or now
            if now - self._too_small_since > _GONE_SECONDS:
                raise
            return
        self._too_small_since = None
        if not self._private and seconds > 20 and not self._told_queue and not self._quiet:
            self._told_queue = True
            print(f"waiting for room in the cluster: {free_cpus()} CPUs are free", flush=True)


def blame(lost: dict[str, list[str]], hang_seconds: float) -> tuple[int, str] | None:
    """The rank that was lost and how; the errors that its loss caused in others come after it. None: a named error
    or a bug, which another try would meet again.

    Args:
        lost: By rank, the names of the error's classes and of theirs whom it wraps.
    """
    how = {
        "WorkerHealthCheckTimeoutError": f"gave no sign of life for {hang_seconds:.0f} s and was killed",
        "RayActorError": "died (killed, or out of memory)",
    }
    for kind, told in how.items():
        for rank, names in lost.items():
            if kind in names:
                return int(rank), told
    final = {"UserError", *(kind.__name__ for kind in BUGS)}
    if any(final & set(names) for names in lost.values()):
        return None
    rank = min(lost, key=int)
    return int(rank), f"failed ({lost[rank][0]})"


def named(error: Exception, world: int, stuck: Mapping[int, str]) -> Exception:
    """Ray's error as ours: a dead worker is the user's to know, anything else is a bug with its traceback."""
    if stuck:
        return WorkerLost(
            f"{next(iter(stuck.values()))}, and the allowed failures are used up; the same command continues from the "
            "last checkpoint"
        )
    failures = {str(rank): failure for rank, failure in getattr(error, "worker_failures", {}).items()}
    for rank, failure in failures.items():
        wrapped = getattr(failure, "health_check_failure", failure)
        names = [one.__name__ for kind in (failure, wrapped) for one in type(kind).__mro__]
        if {"RayActorError", "WorkerHealthCheckTimeoutError"} & set(names):
            return WorkerLost(
                f"rank {rank} of {world} died (killed, out of memory, or without a sign of life), and the allowed "
                "failures are used up; the same command continues from the last checkpoint"
            )
    if type(getattr(error, "controller_failure", None)).__name__ == "WorkerGroupStartupTimeoutError":
        return UserError(
            "Ray found no room for the workers for a long time: others use the cluster; run the same command again "
            "later, or start fewer workers"
        )
    return RuntimeError(f"Ray Train failed\n{error}")
