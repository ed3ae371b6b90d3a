"""The Slurm job that this process runs in: what it has, what Slurm thinks of it, and how it goes on later.

Everything is read from the variables of the batch step, which every Slurm since 20.11 sets; `squeue`, `scontrol` and
`sbatch` are asked only where a decision needs them, and each may be out of reach (inside a container, on a site that
hides them): no answer is an answer.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_ASK_SECONDS = 30.0

GOES_ON = "; goes on after job "
"""In a successor's comment: before it stands the comment of the job that it follows, after it that job's number."""


@dataclass(frozen=True)
class SlurmJob:
    """One start of one job.

    Attributes:
        number: As commands take it; of an array `1234_5`.
        cluster, restarts: Name of the cluster, and how often Slurm has started the job again.
        nodes: How many; `node` is the name of this one.
        cpus: Of the node that has the fewest.
        gpus: Of this node, in the job.
        tasks_per_node: What `--ntasks-per-node` asked for, or None.
    """

    number: str
    cluster: str
    restarts: int
    nodes: int
    node: str
    node_list: str
    cpus: int
    gpus: int
    tasks_per_node: int | None

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> SlurmJob | None:
        """The job whose batch step this is; None outside a job."""
        number = environment.get("SLURM_JOB_ID")
        if not number:
            return None
        if "SLURM_ARRAY_JOB_ID" in environment:
            number = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
        tasks = environment.get("SLURM_NTASKS_PER_NODE")
        return cls(
            number=number,
            cluster=environment.get("SLURM_CLUSTER_NAME", ""),
            restarts=int(environment.get("SLURM_RESTART_COUNT") or 0),
            nodes=int(environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or 1),
            node=environment.get("SLURMD_NODENAME", ""),
            node_list=environment.get("SLURM_JOB_NODELIST", ""),
            cpus=min(tasks_per_node(environment.get("SLURM_JOB_CPUS_PER_NODE", "1"))),
            gpus=int(environment.get("SLURM_GPUS_ON_NODE") or 0),
            tasks_per_node=int(tasks) if tasks else None,
        )

    @property
    def marker(self) -> str:
        """What every process of this start carries in its environment as VAEDIST_JOB."""
        return f"{self.cluster}.{self.number}.{self.restarts}"

    def ranks_per_node(self) -> int:
        """GPUs of the job on this node, else `--ntasks-per-node`, else 1."""
        return self.gpus or self.tasks_per_node or 1

    def node_names(self) -> list[str]:
        """Names of all nodes, in Slurm's order; empty where scontrol is not in reach."""
        shown = ask("scontrol", "show", "hostnames", self.node_list)
        return shown.split() if shown else []

    def state(self) -> str:
        """Such as RUNNING, CANCELLED, PENDING; empty where Slurm does not answer."""
        shown = ask("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={self.number}")
        return shown.split()[0] if shown and shown.split() else ""

    def idle_gpus(self) -> int:
        """GPUs that this node has although the job has none."""
        if self.gpus:
            return 0
        shown = ask("scontrol", "show", "node", self.node, "--oneliner") or ""
        return sum(int(count) for count in re.findall(r"\bGres=\S*?gpu:(?:[^:,(\s]+:)?(\d+)", shown))

    def requeue(self) -> str | None:
        """Ask Slurm to run this job again; what it answered where it would not."""
        return _order("scontrol", "requeue", self.number)

    def submit_successor(self, script: Path, arguments: Sequence[str], restarts: int) -> tuple[str, str]:
        """Hand in the same batch script once more, to begin when this job has ended however it ends.

        Slurm gives a job's own options to its script only as variables: number and size of the nodes, partition, name
        and time limit are asked for again, everything else comes from the script and from SBATCH_* variables.

        Returns:
            The successor's number, or nothing and what Slurm answered.
        """
        environment = os.environ
        told = ask("squeue", "--noheader", "--format=%l|%k", f"--jobs={self.number}") or ""
        limit, _, comment = told.strip().partition("|")
        own = comment.partition(GOES_ON)[0].replace("(null)", "") or "vaedist"
        options = {
            "job-name": environment.get("SLURM_JOB_NAME"),
            "array": environment.get(
                "SLURM_ARRAY_TASK_ID"
            ),  # this task alone, not all that the script asks for
            "partition": environment.get("SLURM_JOB_PARTITION"),
            "account": environment.get("SLURM_JOB_ACCOUNT"),
            "qos": environment.get("SLURM_JOB_QOS"),
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.tasks_per_node) if self.tasks_per_node else None,
            "cpus-per-task": environment.get("SLURM_CPUS_PER_TASK"),
            "mem": environment.get("SLURM_MEM_PER_NODE"),
            "gpus-per-node": str(self.gpus) if self.gpus else None,
            "time": limit or None,
        }
        command = [
            "sbatch",
            "--parsable",
            f"--dependency=afterany:{self.number}",
            f"--comment={own}{GOES_ON}{self.number}",
            f"--export=ALL,VAEDIST_RESTARTS={restarts}",
            *(f"--{name}={value}" for name, value in options.items() if value),
            str(script),
            *arguments,
        ]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=_ASK_SECONDS,
                check=False,
                cwd=environment.get("SLURM_SUBMIT_DIR"),
                env=_outside(environment),
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return "", str(error)
        return (
            (done.stdout.strip().partition(";")[0], "") if done.returncode == 0 else ("", done.stderr.strip())
        )

    def successors(self) -> list[str]:
        """Numbers of the jobs that starts of this one have handed in, and that still wait for its end."""
        columns = ("--states=PENDING", f"--user={os.getuid()}", "--format=%i|%k")
        listed = ask("squeue", "--noheader", "--all", *columns) or ""
        found = [line.partition("|") for line in listed.splitlines()]
        return [
            number.strip() for number, _, told in found if told.strip().endswith(f"{GOES_ON}{self.number}")
        ]

    def preempted(self) -> bool:
        """Whether Slurm takes this job off its nodes for another one, and does not queue it again.

        Such a job, one that it does queue again and one that its user has cancelled are all called COMPLETING; only of
        this one it says when it was preempted (22.05).
        """
        return (
            re.search(r"\bPreemptTime=\d", ask("scontrol", "--oneliner", "show", "job", self.number) or "")
            is not None
        )

    def cancel(self, number: str) -> None:
        """Take another job of this user back."""
        ask("scancel", number)


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form, such as `4(x2),3`, as a list: 4, 4, 3."""
    counts = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def _outside(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without this job's variables, some of which sbatch would take for options."""
    ours = ("SLURM", "VAEDIST_JOB", "VAEDIST_ATTEMPT")
    return {
        name: value
        for name, value in environment.items()
        if name == "SLURM_CONF" or not name.startswith(ours)
    }


def ask(
    *command: str, seconds: float = _ASK_SECONDS, environment: Mapping[str, str] | None = None
) -> str | None:
    """What a command of Slurm's prints; None where it is not there, refuses, or does not answer in time."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=True, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _order(*command: str) -> str | None:
    """None where it was done, else what the command said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"
