"""What dead jobs left behind on this node: their processes, temporary folders and shared memory.

Slurm ends what it started, but some get away: where processes are tracked by their parents (`proctrack/linuxproc`), all
that was handed to process 1; on a node that was lost for a while, all that ran there. So every process of a batch job
carries `VAEDIST_JOB=CLUSTER.JOB.RESTART`, and the next job of the same user on the node kills those of starts that are
over. Nothing is killed on suspicion:

| seen | done |
|---|---|
| Slurm does not answer, or does not list the asking job as running here | nothing |
| the start is of another cluster | left alone |
| Slurm lists its job on this node, or still completing anywhere | left alone, Slurm ends it |
| Slurm lists its job as running here, with a higher restart count | an earlier start: killed |
| Slurm does not list its job on this node | killed |

Processes are looked at before Slurm is asked: a job that starts in between is in Slurm's answer and not among them. A
job that was handed in from within another one may have inherited the marker of that; what Slurm itself wrote into a
process's environment counts for more.

Temporary folders (`vd-UID-*`) are held by a flock, and the proof that their owner has gone is that it is free. Shared
memory has a name only for a moment (NCCL, Ray, torch); what has one still, and no process has it open, is removed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vaedist.core.temporary_folder import sweep_folders
from vaedist.slurm.batch_job import SlurmJob, ask

MARK = "VAEDIST_JOB"

_ROUNDS = 5
"""Of looking and killing: what is about to be killed may be starting others."""

_DEATH_SECONDS = 5.0
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - what is looked at, not where anything is put
_NAMES = ("nccl-", "plasma", "torch_")
_YOUNG_SECONDS = 60.0
"""Younger shared memory may be about to be opened."""


@dataclass(frozen=True)
class Start:
    """One start of one Slurm job."""

    cluster: str
    job: str
    restart: int

    @classmethod
    def of_marker(cls, marker: str) -> Start | None:
        """The start that a marker names; None where it is none."""
        *_, cluster, job, restart = "", "", *marker.rsplit(".", 2)
        return cls(cluster, job, int(restart)) if cluster and job and restart.isdecimal() else None

    @classmethod
    def of_process(cls, environment: Mapping[str, str]) -> Start | None:
        """The start that a process of ours belongs to; None for one that is not ours."""
        if MARK not in environment:
            return None
        with contextlib.suppress(ValueError):
            if job := SlurmJob.here(environment):
                return cls(job.cluster, job.number, job.restarts)
        return cls.of_marker(environment[MARK])


@dataclass
class Swept:
    """What `sweep` did; false if there was nothing to do.

    Attributes:
        killed: By start, the names of its processes.
        stubborn: Processes that could not be ended.
        removed: Folders and files.
    """

    killed: dict[Start, list[str]] = field(default_factory=dict)
    stubborn: list[str] = field(default_factory=list)
    removed: list[Path] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.killed or self.stubborn or self.removed)

    def __str__(self) -> str:
        told = []
        for start, names in self.killed.items():
            again = f" (restart {start.restart})" if start.restart else ""
            told.append(f"killed {len(names)} processes of job {start.job}{again}: {', '.join(names)}")
        if self.removed:
            told.append(f"removed {', '.join(map(str, self.removed))}")
        if self.stubborn:
            told.append(f"could not end {', '.join(self.stubborn)}")
        return "; ".join(told)


@dataclass(frozen=True)
class _Process:
    pid: int
    started: str
    name: str
    start: Start


def sweep(marker: str, node: str | None = None) -> Swept:
    """Remove from this node what is left of this user's dead jobs, and of nobody else.

    Args:
        marker: `VAEDIST_JOB` of the asking job, which must be running here.
        node: Slurm's name of this node; default: `SLURMD_NODENAME`.
    """
    swept = Swept()
    me, node = Start.of_marker(marker), node or os.environ.get("SLURMD_NODENAME")
    if me is None or not node:
        return swept
    seen = list(_ours())
    others = {process.start for process in seen} - {me}
    if others and (living := _living(me, node)) is not None:
        dead = {start for start in others if start.cluster == me.cluster and _over(start, living)}
        _end(dead, swept)
    _remove_folders(swept)
    _remove_memory(swept)
    return swept


# Who lives --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Listed:
    """What Slurm says of a job of this user."""

    state: str
    restarts: int


def _over(start: Start, living: Mapping[str, _Listed]) -> bool:
    found = living.get(start.job)
    return found is None or (found.state == "RUNNING" and found.restarts > start.restart)


def _living(me: Start, node: str) -> dict[str, _Listed] | None:
    """This user's jobs on the node, and those that are completing anywhere; None where that cannot be told."""
    found: dict[str, _Listed] = {}
    for which in ("--states=COMPLETING", f"--nodelist={node}"):
        answer = _squeue(which)
        if answer is None:
            return None
        for line in answer.splitlines():
            fields = line.split()
            if len(fields) != 4 or not fields[3].isdecimal():
                return None
            listed = _Listed(fields[2], int(fields[3]))
            for number in (
                fields[0],
                fields[1],
                fields[1].partition("+")[0],
            ):  # 7, 5_2 of an array, 7+0 of several
                if listed.state == "COMPLETING" or found.get(number, listed).state != "COMPLETING":
                    found[number] = listed
    return found if found.get(me.job) == _Listed("RUNNING", me.restart) else None


def _squeue(which: str) -> str | None:
    # A person's own SQUEUE_... settings may hide jobs, and so may the partition they are in.
    environment = {name: text for name, text in os.environ.items() if not name.startswith("SQUEUE_")}
    environment.pop("SLURM_CLUSTERS", None)
    columns = "--Format=JobID:40,JobArrayID:40,State:20,RestartCnt:12"
    return ask(
        "squeue", "--noheader", "--all", f"--user={os.getuid()}", which, columns, environment=environment
    )


# Processes --------------------------------------------------------------------------------------------------


def _ours() -> Iterator[_Process]:
    """Every process of this user that carries a marker, but for this one and those that it comes from."""
    family = _family()
    for entry in Path("/proc").glob("[0-9]*"):
        if int(entry.name) not in family and (process := _look(int(entry.name))) is not None:
            yield process


def _look(pid: int) -> _Process | None:
    """A process of ours; None if it is none, or has ended."""
    entry = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError):
        if entry.stat().st_uid != os.getuid():
            return None
        text = (entry / "environ").read_bytes().decode(errors="replace")
        environment = dict(line.partition("=")[::2] for line in text.split("\0") if "=" in line)
        start = Start.of_process(environment)
        name, _, rest = (entry / "stat").read_text(errors="replace").rpartition(")")
        fields = rest.split()
        if start is not None and fields[0] not in "ZX":
            return _Process(pid, fields[19], f"{pid} {name.partition('(')[2]}", start)
    return None


def _family() -> set[int]:
    found, pid = {os.getpid()}, os.getppid()
    while pid > 1 and pid not in found:
        found.add(pid)
        with contextlib.suppress(OSError):
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return found


def _end(dead: set[Start], swept: Swept) -> None:
    """Kill every process of these starts, and the shared memory that only they had open."""
    memory: set[str] = set()
    killed: dict[tuple[int, str], _Process] = {}
    left: list[_Process] = []
    for _ in range(_ROUNDS):
        left = [process for process in _ours() if process.start in dead]
        if not left:
            break
        for process in left:
            memory |= _open_in(process.pid)
            if _look(process.pid) == process:  # still the same one
                with contextlib.suppress(OSError):
                    os.kill(process.pid, signal.SIGKILL)
                    killed[process.pid, process.started] = process
        deadline = time.monotonic() + _DEATH_SECONDS
        while any(_look(process.pid) == process for process in left) and time.monotonic() < deadline:
            time.sleep(0.02)
    swept.stubborn += [process.name for process in left if _look(process.pid) == process]
    for process in killed.values():
        if process.name not in swept.stubborn:
            swept.killed.setdefault(process.start, []).append(process.name)
    for name in sorted(memory - _open_memory()):
        _unlink(Path(name), swept)


# Files ------------------------------------------------------------------------------------------------------


def _remove_folders(swept: Swept) -> None:
    swept.removed += sweep_folders()


def _remove_memory(swept: Swept) -> None:
    found = [path for path in _SHARED_MEMORY.glob("*") if path.name.startswith(_NAMES)]
    if not found:
        return
    used = _open_memory()
    for path in found:
        with contextlib.suppress(OSError):
            if str(path) not in used and time.time() - path.lstat().st_mtime > _YOUNG_SECONDS:
                _unlink(path, swept)


def _unlink(path: Path, swept: Swept) -> None:
    with contextlib.suppress(OSError):
        found = path.lstat()
        if found.st_uid == os.getuid() and stat.S_ISREG(found.st_mode):
            path.unlink()
            swept.removed.append(path)


def _open_memory() -> set[str]:
    return {name for entry in Path("/proc").glob("[0-9]*") for name in _open_in(int(entry.name))}


def _open_in(pid: int) -> set[str]:
    """Files of shared memory that a process has open or mapped."""
    found: set[str] = set()
    with contextlib.suppress(OSError):
        found |= {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
        found |= {line.split(maxsplit=5)[5] for line in lines if line.count("/") > 1}
    return {name for name in found if name.startswith(f"{_SHARED_MEMORY}/")}


def sweep_here() -> None:
    """Sweep the node that this process runs on, for the job that it belongs to, and say what was found."""
    if swept := sweep(os.environ.get(MARK, "")):
        node = os.environ.get("SLURMD_NODENAME", "")
        print(f"vaedist: {node}: left behind by dead jobs: {swept}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sweep_here()
