"""How a batch job continues after Slurm stopped it, at most `max_restarts` times.

| `continue_by` | what happens |
|---|---|
| `requeue` | the job asks Slurm to queue it again (`scontrol requeue`) |
| `resubmit` | at its start the job submits a successor, which waits for its end and goes on |
| `none` | nothing: the user submits the same command again |

The cap exists because a job that fails every time must not stay in the queue for ever.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vaedist.core.errors import UserError
from vaedist.slurm.batch_job import SlurmJob, environment_without, log, slurm_command, slurm_output

SUCCESSOR_COMMENT = "; goes on after job "
"""In a successor's comment: before it stands the comment of the job that it follows, after it that job's number."""


@dataclass
class RequeuePolicy:
    """Whether, how and how often a job continues.

    Attributes:
        continue_by: `requeue`, `resubmit` or `none`.
        max_restarts: The cap, over requeues and successors together.
        successor: Number of the job that waits to continue this one; empty: none.
    """

    job: SlurmJob
    continue_by: str
    max_restarts: int
    successor: str = field(default="", init=False)

    @property
    def restarts(self) -> int:
        """How often this job was requeued, and its predecessors before it."""
        return self.job.restarts + int(os.environ.get("VAEDIST_RESTARTS") or 0)

    @property
    def why_not(self) -> str:
        """Why the job may not continue; empty: it may."""
        if self.continue_by == "none":
            return "continue_by: none"
        return f"{self.restarts} restarts, max_restarts" if self.restarts >= self.max_restarts else ""

    def prepare(self) -> None:
        """Submit the successor where there is to be one: when time is up it may be too late for that."""
        if self.continue_by != "resubmit":
            return
        if self.job.restarts:
            # Slurm requeued this job before its last start could cancel its own successor (a lost node).
            for number in pending_successors(self.job):
                cancel_job(number)
                log(f"job {number}, which an earlier start of this one submitted, is cancelled")
        if self.why_not:
            return
        script = os.environ.get("VAEDIST_SCRIPT")
        if not script:
            raise UserError(
                'continue_by: resubmit needs to know the batch script: set VAEDIST_SCRIPT="$0" and '
                "VAEDIST_SCRIPT_ARGUMENTS in it, as jobs/start does"
            )
        arguments = os.environ.get("VAEDIST_SCRIPT_ARGUMENTS", "").split("\x1f")
        given = [argument for argument in arguments if argument]
        self.successor, refusal = submit_successor(self.job, Path(script), given, self.restarts + 1)
        log(
            f"job {self.successor} waits for the end of this one and goes on where it stops"
            if self.successor
            else f"no successor could be submitted ({refusal}): run the same command again when this job has ended"
        )

    def continue_later(self) -> None:
        """Requeue the job if it may be, and say what becomes of it; a successor waits already."""
        by_hand = "the same sbatch command goes on from the last checkpoint"
        if self.why_not:
            log(f"not submitted again ({self.why_not}): {by_hand}")
        elif self.continue_by == "requeue" and (refusal := requeue(self.job)):
            hint = "continue_by: resubmit in the site file avoids this"
            log(f"Slurm did not requeue this job ({refusal}): {by_hand}; {hint}")
        elif self.continue_by == "requeue":
            log(f"requeued: Slurm starts job {self.job.number} again, after 2 minutes at the earliest")

    def cancel_successor(self) -> None:
        """Nothing is left for it to do, or it would meet the same error."""
        if self.successor:
            cancel_job(self.successor)


def requeue(job: SlurmJob) -> str:
    """Ask Slurm to run this job again; what it answered where it refused, else empty."""
    answer = slurm_command("scontrol", "requeue", job.number)
    if answer is None:
        return "scontrol does not answer"
    return "" if answer.returncode == 0 else answer.stderr.strip() or f"exit code {answer.returncode}"


def submit_successor(job: SlurmJob, script: Path, arguments: Sequence[str], restarts: int) -> tuple[str, str]:
    """Submit the same batch script once more, to begin when this job has ended in whatever way.

    Slurm gives a job's own options to its script only as variables. Number and size of the nodes, partition, name and
    time limit are asked for again; everything else comes from the script and from SBATCH_* variables.

    Returns:
        The successor's number and "", or "" and what Slurm answered.
    """
    environment = os.environ
    shown = slurm_output("squeue", "--noheader", "--format=%l|%k", f"--jobs={job.number}") or ""
    limit, _, comment = shown.strip().partition("|")
    own = comment.partition(SUCCESSOR_COMMENT)[0].replace("(null)", "") or "vaedist"
    options = {
        "job-name": environment.get("SLURM_JOB_NAME"),
        "array": environment.get("SLURM_ARRAY_TASK_ID"),  # this task alone, not all that the script asks for
        "partition": environment.get("SLURM_JOB_PARTITION"),
        "account": environment.get("SLURM_JOB_ACCOUNT"),
        "qos": environment.get("SLURM_JOB_QOS"),
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.tasks_per_node) if job.tasks_per_node else None,
        "cpus-per-task": environment.get("SLURM_CPUS_PER_TASK"),
        "mem": environment.get("SLURM_MEM_PER_NODE"),
        "gpus-per-node": str(job.gpus) if job.gpus else None,
        "time": limit or None,
    }
    answer = slurm_command(
        "sbatch",
        "--parsable",
        f"--dependency=afterany:{job.number}",
        f"--comment={own}{SUCCESSOR_COMMENT}{job.number}",
        f"--export=ALL,VAEDIST_RESTARTS={restarts}",
        *(f"--{name}={value}" for name, value in options.items() if value),
        str(script),
        *arguments,
        environment=environment_without("SLURM", "VAEDIST_JOB", "VAEDIST_ATTEMPT"),
        folder=environment.get("SLURM_SUBMIT_DIR"),
    )
    if answer is None:
        return "", "sbatch does not answer"
    number = answer.stdout.strip().partition(";")[0]
    return (number, "") if answer.returncode == 0 else ("", answer.stderr.strip())


def pending_successors(job: SlurmJob) -> list[str]:
    """Numbers of the jobs that starts of this one have submitted, and that still wait for its end."""
    columns = ("--states=PENDING", f"--user={os.getuid()}", "--format=%i|%k")
    listed = slurm_output("squeue", "--noheader", "--all", *columns) or ""
    rows = [line.partition("|") for line in listed.splitlines()]
    ending = f"{SUCCESSOR_COMMENT}{job.number}"
    return [number.strip() for number, _, comment in rows if comment.strip().endswith(ending)]


def cancel_job(number: str) -> None:
    """Cancel another job of this user."""
    slurm_command("scancel", number)
