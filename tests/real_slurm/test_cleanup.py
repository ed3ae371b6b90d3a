"""What dead jobs left on a node the next job there removes: a real Slurm loses what escapes to process 1."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from tests.real_slurm.cluster import Slurm, until
from tests.run_commands import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(300)]

MARK = "export VAEDIST_JOB=$SLURM_CLUSTER_NAME.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}\n"
CLEAN = f"PYTHONPATH={shlex.quote(str(ROOT))} {shlex.quote(sys.executable)} -m vaedist.slurm.cleanup\n"


class Jobs:
    """Batch scripts on node n1 that sleep so many seconds as nobody else does, which tells their processes apart."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder

    def submit(self, script: str, **variables: str) -> str:
        path = self.folder / "batch.sh"
        path.write_text("#!/usr/bin/env bash\n" + script)
        return self.slurm.sbatch(
            "--nodelist=n1",
            "--open-mode=append",
            f"--output={self.folder}/%j.out",
            path,
            cwd=self.folder,
            environment={"OMP_NUM_THREADS": "1", **variables},
        )

    def sleeps(self, seconds: int) -> bool:
        listed = self.slurm.on("n1", "ps", "-e", "-o", "args=").splitlines()
        return f"sleep {seconds}" in [line.strip() for line in listed]

    def wait_for(self, *seconds: int) -> None:
        until("processes run", lambda: all(map(self.sleeps, seconds)), 60)


@pytest.fixture
def jobs(slurm: Slurm, tmp_path: Path) -> Jobs:
    return Jobs(slurm, tmp_path)


def test_a_dead_jobs_leftovers_go_and_a_neighbours_stay(jobs: Jobs, slurm: Slurm) -> None:
    node = slurm.on
    # It ends well, and what it handed to process 1 lives on: one process of ours, and one that is not.
    dead = jobs.submit(
        "( setsid sleep 8101 >/dev/null 2>&1 & )\n"
        + MARK
        + "( setsid sleep 8102 >/dev/null 2>&1 & )\nsleep 1\n"
    )
    slurm.wait(dead, "COMPLETED")
    jobs.wait_for(8101, 8102)
    marker = f"{slurm.run('scontrol', 'show', 'config').split('ClusterName')[1].split()[1]}.{dead}.0"
    # A neighbour that was handed in with the dead job's marker in its environment, as from within that job.
    neighbour = jobs.submit(
        MARK + "mkdir -m 700 /tmp/vd-0-used\nexec 9>/dev/shm/nccl-used\n"
        "flock /tmp/vd-0-used sleep 8103 &\nsleep 8104\n",
        VAEDIST_JOB=marker,
    )
    jobs.wait_for(8103, 8104)
    node("n1", "mkdir", "-m", "700", "/tmp/vd-0-left")
    node("n1", "touch", "-d", "yesterday", "/dev/shm/nccl-left", "/dev/shm/nccl-used", "/dev/shm/mine")
    sweeper = jobs.submit(MARK + CLEAN + "( setsid sleep 8105 >/dev/null 2>&1 & )\n" + CLEAN)
    slurm.wait(sweeper, "COMPLETED")
    [told] = slurm.output(sweeper).splitlines()
    assert told.startswith(f"vaedist: n1: left behind by dead jobs: killed 1 processes of job {dead}: ")
    assert told.endswith(" sleep; removed /tmp/vd-0-left, /dev/shm/nccl-left")
    left = node("n1", "ls", "/tmp", "/dev/shm").split()
    assert {"vd-0-used", "nccl-used", "mine"} <= set(left)
    assert not {"vd-0-left", "nccl-left"} & set(left)
    assert not jobs.sleeps(8102)
    assert all(map(jobs.sleeps, (8101, 8103, 8104, 8105)))
    assert slurm.state(neighbour) == "RUNNING"
    slurm.run("scancel", neighbour)
    slurm.wait(neighbour, "CANCELLED")
    # The sweeper left something itself; a job array is told apart from others too.
    array = slurm.sbatch(
        "--array=3", "--nodelist=n1", f"--output={jobs.folder}/array.out", "--wrap",
        MARK.replace("$SLURM_JOB_ID", "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID") + CLEAN,
        cwd=jobs.folder,
    )  # fmt: skip
    slurm.wait(array, "COMPLETED")
    assert f"processes of job {sweeper}: " in (jobs.folder / "array.out").read_text()
    assert not jobs.sleeps(8105) and jobs.sleeps(8101)
    node("n1", "pkill", "-f", "^sleep 8101$")
    node("n1", "rm", "-rf", "/tmp/vd-0-used", "/dev/shm/nccl-used", "/dev/shm/mine")


def test_a_requeued_job_ends_what_its_first_start_left(jobs: Jobs, slurm: Slurm) -> None:
    job = jobs.submit(
        MARK + "if [ -z $SLURM_RESTART_COUNT ]; then\n"
        "( setsid sleep 8201 >/dev/null 2>&1 & )\nsleep 8202\nelse\n"
        f"( setsid sleep 8203 >/dev/null 2>&1 & )\n{CLEAN}fi\n"
    )
    jobs.wait_for(8201, 8202)
    slurm.run("scontrol", "requeue", job)
    slurm.release(job)
    slurm.wait(job, "COMPLETED")
    assert f"killed 1 processes of job {job}: " in slurm.output(job)
    assert not jobs.sleeps(8201) and jobs.sleeps(8203)
    slurm.on("n1", "pkill", "-f", "^sleep 8203$")


def test_a_job_that_slurm_is_ending_is_left_to_save_what_it_can(jobs: Jobs, slurm: Slurm) -> None:
    saving = jobs.submit(MARK + "trap '' TERM\nsleep 8301 &\nwhile true; do wait; sleep 0.2; done\n")
    jobs.wait_for(8301)
    watch = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from vaedist.slurm.cleanup import clean_node

print("here", flush=True)
def completing():
    return subprocess.check_output(["squeue", "-h", "--states=COMPLETING", "-o%i"], text=True).split()
while {saving!r} not in completing():
    time.sleep(0.1)
print("swept", bool(clean_node(os.environ["VAEDIST_JOB"])), completing(), flush=True)
"""
    script = jobs.folder / "watch.py"
    script.write_text(watch)
    sweeper = jobs.submit(f"{MARK}{shlex.quote(sys.executable)} {shlex.quote(str(script))}\n")
    until("the sweeper looks", lambda: "here" in slurm.output(sweeper), 60)
    slurm.run("scontrol", "requeue", saving)  # Slurm counts the restart at once, and ends the first start
    slurm.wait(sweeper, "COMPLETED")
    assert slurm.output(sweeper).splitlines()[-1] == f"swept False ['{saving}']"
