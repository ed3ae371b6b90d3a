"""The allocation's numbers, from fake roots and environments: cgroup v1, v2 and both, containers, and Slurm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vaedist.core.errors import UserError
from vaedist.launchers.allocation import Allocation, allocation

GIB = 1 << 30
V1 = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
"""
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


class Machine:
    """A root folder with 64 GiB of memory; 64 CPUs in the mask."""

    def __init__(self, root: Path, mounts: str = "", groups: str = "") -> None:
        self.root = root
        self.write("proc/meminfo", "MemTotal:       67108864 kB\nMemFree:         1000 kB\n")
        self.write("proc/self/mountinfo", mounts)
        self.write("proc/self/cgroup", groups)

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def look(self, affinity: int = 64, **environment: str) -> Allocation:
        return allocation(self.root, environment, affinity)


def test_without_limits_it_is_the_machine(tmp_path: Path) -> None:
    found = Machine(tmp_path, V2, "0::/user.slice/session-1.scope\n").look()
    assert (found.cpus, found.gpus, found.memory) == (64, 0, 64 * GIB)
    assert (found.cpus_by, found.memory_by) == ("the affinity mask", "the machine")


def test_a_limit_above_the_own_v2_group_counts(tmp_path: Path) -> None:
    """As under slurmstepd: the step's own group says max, the job's above it has the limit."""
    machine = Machine(tmp_path, V2, "0::/system.slice/slurmstepd.scope/job_7/step_0\n")
    here = "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7"
    machine.write(f"{here}/memory.max", f"{3 * GIB}\n")
    machine.write(f"{here}/cpu.max", "250000 100000\n")
    machine.write(f"{here}/step_0/memory.max", "max\n")
    machine.write(f"{here}/step_0/cpu.max", "max 100000\n")
    machine.write("sys/fs/cgroup/system.slice/memory.max", f"{30 * GIB}\n")
    machine.write("sys/fs/cgroup/neighbour/memory.max", "1\n")
    found = machine.look()
    assert (found.cpus, found.memory) == (2, 3 * GIB)
    assert "job_7" in found.cpus_by and "job_7" in found.memory_by


def test_less_than_one_cpu_is_one(tmp_path: Path) -> None:
    machine = Machine(tmp_path, V2, "0::/a\n")
    machine.write("sys/fs/cgroup/a/cpu.max", "50000 100000\n")
    assert machine.look().cpus == 1


def test_v1_has_its_own_files_per_controller(tmp_path: Path) -> None:
    machine = Machine(tmp_path, V1, "4:memory:/slurm/uid_7/job_9\n2:cpu,cpuacct:/slurm/uid_7\n0::/\n")
    machine.write("sys/fs/cgroup/memory/slurm/uid_7/job_9/memory.limit_in_bytes", f"{5 * GIB}\n")
    machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    machine.write("sys/fs/cgroup/cpu,cpuacct/slurm/uid_7/cpu.cfs_quota_us", "400000\n")
    machine.write("sys/fs/cgroup/cpu,cpuacct/slurm/uid_7/cpu.cfs_period_us", "100000\n")
    machine.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    machine.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    found = machine.look()
    assert (found.cpus, found.memory) == (4, 5 * GIB)


def test_a_container_sees_its_part_of_the_hierarchy(tmp_path: Path) -> None:
    mounts = V1.replace("0:32 / ", "0:32 /docker/ab ")
    machine = Machine(tmp_path, mounts, "4:memory:/docker/ab\n")
    machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2 * GIB}\n")
    assert machine.look().memory == 2 * GIB


def test_a_group_outside_of_what_is_mounted_takes_the_mount_itself(tmp_path: Path) -> None:
    machine = Machine(tmp_path, V2, "0::/../../other\n")
    machine.write("sys/fs/cgroup/memory.max", f"{2 * GIB}\n")
    machine.write("other/memory.max", "1\n")
    assert machine.look().memory == 2 * GIB


def test_the_mask_counts_where_it_is_smaller(tmp_path: Path) -> None:
    machine = Machine(tmp_path, V2, "0::/a\n")
    machine.write("sys/fs/cgroup/a/cpu.max", "800000 100000\n")
    assert machine.look(affinity=3).cpus == 3
    assert machine.look(affinity=3, SLURM_CPUS_ON_NODE="2").cpus == 2
    assert machine.look(affinity=3, SLURM_CPUS_ON_NODE="16").cpus == 3


@pytest.mark.parametrize(
    ("variables", "memory", "by"),
    [
        ({"SLURM_MEM_PER_NODE": "2048"}, 2 * GIB, "SLURM_MEM_PER_NODE"),
        ({"SLURM_MEM_PER_CPU": "512"}, 2 * GIB, "SLURM_MEM_PER_CPU"),
        ({"SLURM_MEM_PER_NODE": "0"}, 64 * GIB, "the machine"),
        ({"SLURM_MEM_PER_GPU": "8192", "SLURM_GPUS_ON_NODE": "2"}, 16 * GIB, "SLURM_MEM_PER_GPU"),
        ({"SLURM_MEM_PER_NODE": "999999999"}, 64 * GIB, "the machine"),
    ],
)
def test_slurm_counts_memory_in_mebibytes(
    variables: dict[str, str], memory: int, by: str, tmp_path: Path
) -> None:
    found = Machine(tmp_path).look(SLURM_CPUS_ON_NODE="4", **variables)
    assert (found.memory, found.memory_by) == (memory, by)


@pytest.mark.parametrize(
    ("variables", "gpus"),
    [
        ({}, 4),  # what the machine has
        ({"SLURM_JOB_ID": "7"}, 4),  # salloc's shell on a login node is no step
        ({"SLURM_CPUS_ON_NODE": "4"}, 0),  # a job that asked for none, on a node that shows all of its own
        ({"SLURM_CPUS_ON_NODE": "4", "SLURM_GPUS_ON_NODE": "2"}, 2),
        ({"SLURM_CPUS_ON_NODE": "4", "SLURM_STEP_GPUS": "1,3,5"}, 3),
        ({"SLURM_CPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "2"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8a2f, MIG-3c"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, 1),  # CUDA reads no further
    ],
)
def test_gpus_are_those_of_the_allocation(variables: dict[str, str], gpus: int, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    for card in range(4):
        machine.write(f"proc/driver/nvidia/gpus/0000:0{card}:00.0/information", "Model: one\n")
    assert machine.look(**variables).gpus == gpus


def test_a_variable_of_slurm_that_is_no_number_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="SLURM_MEM_PER_NODE is '2G'"):
        Machine(tmp_path).look(SLURM_CPUS_ON_NODE="4", SLURM_MEM_PER_NODE="2G")


@pytest.mark.parametrize(("gibibytes", "mebibytes"), [(64, 256), (2, 128), (1, 80)])
def test_the_object_store_is_small_and_never_below_ray_s_least(
    gibibytes: int, mebibytes: int, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, V2, "0::/a\n")
    machine.write("sys/fs/cgroup/a/memory.max", str(gibibytes * GIB))
    assert machine.look().object_store == mebibytes << 20


def test_this_very_machine_has_an_answer() -> None:
    found = allocation()
    assert 1 <= found.cpus <= len(os.sched_getaffinity(0))
    assert 1 << 28 < found.memory <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
