"""The CPUs, GPUs and memory that this process may use: those of its allocation, not all that the node has.

A process is limited by several parties, each in its own place. The smallest number counts:

| limited by | CPUs | memory |
|---|---|---|
| scheduler's affinity mask | `sched_getaffinity(0)` | |
| cgroup v2 of this process and all above it | `cpu.max` | `memory.max` |
| cgroup v1, likewise | `cpu.cfs_quota_us / cpu.cfs_period_us` | `memory.limit_in_bytes` |
| Slurm, for this node | `SLURM_CPUS_ON_NODE` | `SLURM_MEM_PER_NODE`, or `..._PER_CPU` times CPUs |
| the machine | | `/proc/meminfo` |

A limit lies in the cgroup of the process or any above it, so the path of `/proc/self/cgroup` is walked up to the mount
(cgroups(7)). Ray 2.60 reads the mount's root alone and there finds the node; of CPU sets it knows only v1's.

GPUs: `CUDA_VISIBLE_DEVICES` where it is set; in a Slurm job the number that Slurm names, and none if it names none,
even where it can see the node's GPUs; else the cards whose driver is loaded.

Nothing here loads torch or Ray.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vaedist.core.errors import UserError

_UNLIMITED = 1 << 60
"""cgroup v1 writes 2^63 less a page where there is no limit."""


@dataclass(frozen=True)
class Allocation:
    """What this process may use of its node.

    Attributes:
        cpus: Whole CPUs, 1 at least.
        gpus: GPUs.
        memory: Bytes.
        cpus_by, gpus_by, memory_by: Who set that limit, for a message.
    """

    cpus: int
    gpus: int
    memory: int
    cpus_by: str
    gpus_by: str
    memory_by: str

    @property
    def object_store(self) -> int:
        """Bytes of shared memory for Ray's object store: small, because images never pass through it.

        Ray refuses fewer than 75 MiB.
        """
        return max(80 << 20, min(256 << 20, self.memory // 16))


def allocation(
    root: Path = Path("/"), environment: Mapping[str, str] = os.environ, affinity: int | None = None
) -> Allocation:
    """Look at all limits of this process.

    Args:
        root: Where `proc` and `sys` lie; another folder in tests.
        environment: The environment variables.
        affinity: CPUs in the affinity mask; default: this process's.

    Raises:
        UserError: a variable of Slurm's is no number.
    """
    slurm = _Slurm(environment)
    groups = _groups(root)
    cpus = [(affinity or len(os.sched_getaffinity(0)), "the affinity mask")]
    memory = [(_machine(root), "the machine")]
    for group in groups:
        cpus += [(max(1, int(quota)), str(group.name)) for quota in group.limits(_quota)]
        memory += [(limit, str(group.name)) for limit in group.limits(_memory)]
    if slurm.cpus is not None:
        cpus.append((slurm.cpus, "SLURM_CPUS_ON_NODE"))
    gpus = _gpus(root, environment, slurm)
    if (of_slurm := slurm.memory(min(cpus)[0], gpus[0])) is not None:
        memory.append(of_slurm)
    fewest, least = min(cpus, key=lambda one: one[0]), min(memory, key=lambda one: one[0])
    return Allocation(fewest[0], gpus[0], least[0], fewest[1], gpus[1], least[1])


def _machine(root: Path) -> int:
    """Bytes of memory that the kernel has."""
    found = re.search(r"^MemTotal:\s+(\d+) kB$", (root / "proc/meminfo").read_text(), re.MULTILINE)
    assert found, "/proc/meminfo always begins with MemTotal"
    return int(found[1]) << 10


# Slurm ------------------------------------------------------------------------------------------------------


class _Slurm:
    """What Slurm says of this node. Outside a job, or where its variables tell nothing, every answer is None."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        # An interactive `salloc` leaves SLURM_JOB_ID on the login node; the node's own variables come with a step.
        self._environment = environment if "SLURM_CPUS_ON_NODE" in environment else {}

    @property
    def cpus(self) -> int | None:
        return self._number("SLURM_CPUS_ON_NODE")

    @property
    def gpus(self) -> tuple[int, str] | None:
        if not self._environment:
            return None
        if (count := self._number("SLURM_GPUS_ON_NODE")) is not None:
            return count, "SLURM_GPUS_ON_NODE"
        for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
            if listed := self._environment.get(name):
                return len(listed.split(",")), name
        return 0, "Slurm, which gave this job none (no SLURM_GPUS_ON_NODE)"

    def memory(self, cpus: int, gpus: int) -> tuple[int, str] | None:
        """Bytes; Slurm counts in MiB, and 0 stands for the node's whole memory."""
        for name, times in (
            ("SLURM_MEM_PER_NODE", 1),
            ("SLURM_MEM_PER_CPU", cpus),
            ("SLURM_MEM_PER_GPU", gpus),
        ):
            if (megabytes := self._number(name)) and times > 0:
                return (megabytes * times) << 20, name
        return None

    def _number(self, name: str) -> int | None:
        text = self._environment.get(name)
        if text is None:
            return None
        if not text.isdecimal():
            raise UserError(
                f"{name} is {text!r}, which is no number: mend it, or unset it if this is no Slurm job"
            )
        return int(text)


# GPUs -------------------------------------------------------------------------------------------------------


def _gpus(root: Path, environment: Mapping[str, str], slurm: _Slurm) -> tuple[int, str]:
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return _named_devices(visible), "CUDA_VISIBLE_DEVICES"
    if slurm.gpus is not None:
        return slurm.gpus
    cards = root / "proc/driver/nvidia/gpus"
    return (len(list(cards.iterdir())) if cards.is_dir() else 0), "the machine"


def _named_devices(listed: str) -> int:
    """How many devices CUDA takes from its list: it stops at the first that is none (-1, NoDevFiles)."""
    count = 0
    for name in filter(None, (part.strip() for part in listed.split(","))):
        if not (name.isdecimal() or name.startswith(("GPU-", "MIG-"))):
            break
        count += 1
    return count


# cgroups ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """One cgroup of this process: its folder, and the mount above which nothing is."""

    folder: Path
    mount: Path
    name: str

    def limits(self, read: Callable[[Path], float | None]) -> Iterator[int]:
        """Of this group and of every one above it."""
        for folder in (self.folder, *self.folder.parents):
            if (limit := read(folder)) is not None:
                yield int(limit)
            if folder == self.mount:
                return


def _groups(root: Path) -> list[_Group]:
    """The cgroups of this process that limit CPUs or memory, v1 and v2."""
    paths: dict[str, str] = {}  # controller, or "" for v2, to the path that the kernel tells
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        for controller in [""] if number == "0" else controllers.split(","):
            paths[controller] = path
    found = []
    for line in _lines(root / "proc/self/mountinfo"):
        # "32 31 0:29 /part /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu": root of the mount, its place, and its kind
        before, _, after = line.partition(" - ")
        part, place = before.split()[3:5]
        kind, _, options = after.split(maxsplit=2)
        kinds = {"cgroup2": [""], "cgroup": [one for one in options.split(",") if one in ("cpu", "memory")]}
        for controller in kinds.get(kind, []):
            if controller in paths:
                mount = root / place.lstrip("/")
                name = f"the cgroup {paths[controller]}"
                found.append(_Group(mount / _below(paths[controller], part), mount, name))
    return found


def _below(path: str, part: str) -> PurePosixPath:
    """A cgroup's path inside a mount that shows only `part` of the hierarchy, as in a container."""
    inside = PurePosixPath(path)
    if ".." not in inside.parts and inside.is_relative_to(part):
        return inside.relative_to(part)
    return PurePosixPath()  # it lies outside what can be seen here: the mount's own limits are the nearest


def _quota(folder: Path) -> float | None:
    """CPUs that a cgroup's bandwidth amounts to."""
    if (v2 := _words(folder / "cpu.max")) and v2[0] != "max":
        return max(1.0, int(v2[0]) / int(v2[1]))
    quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
    if quota and period and int(quota[0]) > 0:
        return max(1.0, int(quota[0]) / int(period[0]))
    return None


def _memory(folder: Path) -> float | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        if (words := _words(folder / name)) and words[0] != "max" and int(words[0]) < _UNLIMITED:
            return int(words[0])
    return None


def _words(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []  # not there, or hidden from us: it limits nothing that we could know
