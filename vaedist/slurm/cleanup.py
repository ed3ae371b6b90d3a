"""Removal of what dead jobs left behind on this node: their processes, temporary folders and shared memory.

Slurm ends what it started, but some processes escape: where processes are tracked by their parents
(`proctrack/linuxproc`), all whose parent became process 1; on a node that was lost for a while, all that ran there. So
every process of a batch job carries `VAEDIST_JOB=CLUSTER.JOB.RESTART`, and the next job of the same user on the node
kills those of starts that are over. Without proof nothing is killed:

| observation | action |
|---|---|
| Slurm does not answer, or does not list the asking job as running here | nothing |
| the start is of another cluster | left alone |
| Slurm lists its job on this node, or still completing anywhere | left alone, Slurm ends it |
| Slurm lists its job as running here, with a higher restart count | an earlier start: killed |
| Slurm does not list its job on this node | killed |

Processes are read before Slurm is asked: a job that starts in between is in Slurm's answer and not among them. A job
that was submitted from within another job may have inherited the `VAEDIST_JOB` of that one. Then the variables that
Slurm itself set in the process decide.

The owner of a temporary folder (`vd-UID-*`) holds a flock on it, so a folder whose lock is free has no owner any more.
NCCL, Ray and torch unlink shared memory soon after they made it; a file that is still there, and that no process has
open, is removed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vaedist.core.temporary_folder import remove_stale_folders
from vaedist.slurm.batch_job import SlurmJob, environment_without, log, node_name, slurm_output

JOB_VARIABLE = "VAEDIST_JOB"

_ROUNDS = 5
"""Of listing and killing: a process that is about to be killed may be starting others."""

_DEATH_SECONDS = 5.0
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only read, nothing is put there
_SHARED_MEMORY_NAMES = ("nccl-", "plasma", "torch_")
_YOUNG_SECONDS = 60.0
"""A process may be about to open shared memory that is younger."""


@dataclass(frozen=True)
class JobStart:
    """One start of one Slurm job."""

    cluster: str
    job: str
    restart: int

    @classmethod
    def of_marker(cls, marker: str) -> JobStart | None:
        """The start that a value of `VAEDIST_JOB` names; None where it is none."""
        *_, cluster, job, restart = "", "", *marker.rsplit(".", 2)
        return cls(cluster, job, int(restart)) if cluster and job and restart.isdecimal() else None

    @classmethod
    def of_process(cls, environment: Mapping[str, str]) -> JobStart | None:
        """The start that a process of vaedist belongs to; None for any other process."""
        if JOB_VARIABLE not in environment:
            return None
        with contextlib.suppress(ValueError):
            if job := SlurmJob.current(environment):
                return cls(job.cluster, job.number, job.restarts)
        return cls.of_marker(environment[JOB_VARIABLE])


@dataclass
class CleanupReport:
    """What was removed; false if there was nothing.

    Attributes:
        killed: By start, the names of its processes.
        surviving: Processes that could not be ended.
        removed: Folders and files.
    """

    killed: dict[JobStart, list[str]] = field(default_factory=dict)
    surviving: list[str] = field(default_factory=list)
    removed: list[Path] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.killed or self.surviving or self.removed)

    def __str__(self) -> str:
        parts = []
        for start, names in self.killed.items():
            restart = f" (restart {start.restart})" if start.restart else ""
            parts.append(f"killed {len(names)} processes of job {start.job}{restart}: {', '.join(names)}")
        if self.removed:
            parts.append(f"removed {', '.join(map(str, self.removed))}")
        if self.surviving:
            parts.append(f"could not end {', '.join(self.surviving)}")
        return "; ".join(parts)


@dataclass(frozen=True)
class _Process:
    pid: int
    started: str
    name: str
    start: JobStart


def clean_node(marker: str, node: str | None = None) -> CleanupReport:
    """Remove from this node what is left of this user's dead jobs, and of nobody else.

    Args:
        marker: `VAEDIST_JOB` of the asking job, which must be running here.
        node: Slurm's name of this node; default: `SLURMD_NODENAME`.
    """
    report = CleanupReport()
    me, node = JobStart.of_marker(marker), node or node_name()
    if me is None or not node:
        return report
    processes = list(_marked_processes())
    others = {process.start for process in processes} - {me}
    if others and (listed := _listed_jobs(me, node)) is not None:
        _kill({start for start in others if start.cluster == me.cluster and _is_over(start, listed)}, report)
    report.removed += remove_stale_folders()
    _remove_unused_memory(report)
    return report


def clean_this_node() -> None:
    """Clean the node that this process runs on, for the job that it belongs to, and log what was removed."""
    if report := clean_node(os.environ.get(JOB_VARIABLE, "")):
        log(f"{node_name()}: left behind by dead jobs: {report}")


# Which starts are over --------------------------------------------------------------------------------------


def _is_over(start: JobStart, listed: Mapping[str, tuple[str, int]]) -> bool:
    state, restarts = listed.get(start.job, ("", 0))
    return not state or (state == "RUNNING" and restarts > start.restart)


def _listed_jobs(me: JobStart, node: str) -> dict[str, tuple[str, int]] | None:
    """State and restart count of this user's jobs on the node, and of those that are completing anywhere.

    None where Slurm gives no reliable answer.
    """
    listed: dict[str, tuple[str, int]] = {}
    for which in ("--states=COMPLETING", f"--nodelist={node}"):
        answer = _squeue(which)
        if answer is None:
            return None
        for line in answer.splitlines():
            fields = line.split()
            if len(fields) != 4 or not fields[3].isdecimal():
                return None
            job, array, state, restarts = fields
            # A job is known as 7, as 5_2 of an array, and as 7+0 of a heterogeneous job.
            for number in (job, array, array.partition("+")[0]):
                if listed.get(number, ("", 0))[0] != "COMPLETING":
                    listed[number] = state, int(restarts)
    return listed if listed.get(me.job) == ("RUNNING", me.restart) else None


def _squeue(which: str) -> str | None:
    # A person's own SQUEUE_... settings may hide jobs, and so may the partition they are in.
    environment = environment_without("SQUEUE_", "SLURM_CLUSTERS")
    columns = "--Format=JobID:40,JobArrayID:40,State:20,RestartCnt:12"
    user = f"--user={os.getuid()}"
    return slurm_output("squeue", "--noheader", "--all", user, which, columns, environment=environment)


# Processes --------------------------------------------------------------------------------------------------


def _marked_processes() -> Iterator[_Process]:
    """Every process of this user that carries `VAEDIST_JOB`, but for this one and its ancestors."""
    ancestors = _ancestors()
    for entry in Path("/proc").glob("[0-9]*"):
        if int(entry.name) not in ancestors and (process := _marked_process(int(entry.name))) is not None:
            yield process


def _marked_process(pid: int) -> _Process | None:
    """The process of this number if it carries `VAEDIST_JOB` and lives; else None."""
    entry = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError):
        if entry.stat().st_uid != os.getuid():
            return None
        text = (entry / "environ").read_bytes().decode(errors="replace")
        environment = dict(line.partition("=")[::2] for line in text.split("\0") if "=" in line)
        start = JobStart.of_process(environment)
        name, _, rest = (entry / "stat").read_text(errors="replace").rpartition(")")
        fields = rest.split()
        if start is not None and fields[0] not in "ZX":
            return _Process(pid, fields[19], f"{pid} {name.partition('(')[2]}", start)
    return None


def _ancestors() -> set[int]:
    """This process and those that it comes from."""
    found, pid = {os.getpid()}, os.getppid()
    while pid > 1 and pid not in found:
        found.add(pid)
        with contextlib.suppress(OSError):
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return found


def _kill(dead: set[JobStart], report: CleanupReport) -> None:
    """Kill every process of these starts, and remove the shared memory that only they had open."""
    memory: set[str] = set()
    killed: dict[tuple[int, str], _Process] = {}
    left: list[_Process] = []
    for _ in range(_ROUNDS):
        left = [process for process in _marked_processes() if process.start in dead]
        if not left:
            break
        for process in left:
            memory |= _memory_open_in(process.pid)
            if _marked_process(process.pid) == process:  # still the same one
                with contextlib.suppress(OSError):
                    os.kill(process.pid, signal.SIGKILL)
                    killed[process.pid, process.started] = process
        deadline = time.monotonic() + _DEATH_SECONDS
        while (
            any(_marked_process(process.pid) == process for process in left) and time.monotonic() < deadline
        ):
            time.sleep(0.02)
    report.surviving += [process.name for process in left if _marked_process(process.pid) == process]
    for process in killed.values():
        if process.name not in report.surviving:
            report.killed.setdefault(process.start, []).append(process.name)
    for name in sorted(memory - _open_memory()):
        _unlink(Path(name), report)


# Shared memory ----------------------------------------------------------------------------------------------


def _remove_unused_memory(report: CleanupReport) -> None:
    found = [path for path in _SHARED_MEMORY.glob("*") if path.name.startswith(_SHARED_MEMORY_NAMES)]
    if not found:
        return
    used = _open_memory()
    for path in found:
        with contextlib.suppress(OSError):
            if str(path) not in used and time.time() - path.lstat().st_mtime > _YOUNG_SECONDS:
                _unlink(path, report)


def _unlink(path: Path, report: CleanupReport) -> None:
    with contextlib.suppress(OSError):
        status = path.lstat()
        if status.st_uid == os.getuid() and stat.S_ISREG(status.st_mode):
            path.unlink()
            report.removed.append(path)


def _open_memory() -> set[str]:
    return {name for entry in Path("/proc").glob("[0-9]*") for name in _memory_open_in(int(entry.name))}


def _memory_open_in(pid: int) -> set[str]:
    """Files of shared memory that a process has open or mapped."""
    found: set[str] = set()
    with contextlib.suppress(OSError):
        found |= {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
        found |= {line.split(maxsplit=5)[5] for line in lines if line.count("/") > 1}
    return {name for name in found if name.startswith(f"{_SHARED_MEMORY}/")}


if __name__ == "__main__":
    clean_this_node()
