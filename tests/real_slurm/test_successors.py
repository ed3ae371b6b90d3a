"""`continue_by: resubmit`: of a job and its successors at most one goes on, whatever Slurm itself does with the job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.real_slurm.cluster import until
from tests.real_slurm.work import SAVE, TWO, Note, Work

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]


def handed_in(work: Work, *options: str) -> str:
    """Training that goes on by a successor; the job's number."""
    (work.folder / "site.yaml").write_text("continue_by: resubmit\n")
    words = ["train", "job.yaml", "--run-dir", str(work.run), "--device=cpu"]
    return work.submit(
        *options,
        VAEDIST_SITE=str(work.folder / "site.yaml"),
        VAEDIST_SCRIPT=str(work.script),
        VAEDIST_SCRIPT_ARGUMENTS="\x1f".join(words),
    )


def queued(work: Work) -> set[str]:
    """Numbers of all jobs that Slurm may still run."""
    return set(work.slurm.run("squeue", "-h", "-o%i").split())


@pytest.mark.faults(row="F24b", fault="resubmit, and the node of the supervisor loses its power", ray="")
def test_a_job_that_slurm_queues_again_has_one_successor(
    work: Work, whole: Callable[[int], Path], record_property: Note
) -> None:
    slurm, expected = work.slurm, whole(2)
    job = handed_in(work, *TWO)
    work.wait_for_step(SAVE + 10, job)
    (before,) = queued(work) - {job}
    slurm.tool("kill-node", slurm.nodes_of(job)[0])
    try:
        until("Slurm has queued the job again", lambda: slurm.state(job) == "PENDING", 120)
    finally:
        slurm.tool("start-node", "n1")
    slurm.release(job)
    slurm.wait(job, "RUNNING")
    work.wait_for_step(2 * SAVE + 10, job)
    assert f"job {before}, which an earlier start of this one submitted, is cancelled" in slurm.output(job)
    (now,) = queued(work) - {job}
    assert now != before
    slurm.wait(job, "COMPLETED", seconds=300)
    until("no other job is left", lambda: not queued(work), 60)
    assert slurm.restarts(job) == 1
    work.equals(expected)
    record_property("told", "one job and one successor at every moment; none is left at the end")


@pytest.mark.faults(row="F24c", fault="resubmit, and the preempted job may not be queued again", ray="")
def test_a_job_that_slurm_does_not_queue_again_goes_on_in_its_successor(
    work: Work, whole: Callable[[int], Path], record_property: Note
) -> None:
    slurm, expected = work.slurm, whole(2)
    job = handed_in(work, *TWO, "--partition=low", "--no-requeue")
    work.wait_for_step(SAVE + 10, job)
    (successor,) = queued(work) - {job}
    other = slurm.sbatch(
        "--partition=high", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 600"
    )
    slurm.wait(other, "RUNNING")
    slurm.run("scancel", other)
    slurm.wait(job, "PREEMPTED")
    slurm.wait(successor, "COMPLETED", seconds=300)
    work.equals(expected)
    assert "restart 1" in slurm.output(successor)
    record_property("told", "the successor goes on from the last checkpoint")
