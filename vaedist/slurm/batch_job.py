"""The Slurm job and job step that this process runs in, and what Slurm's commands answer about jobs.

Everything is read from the variables of the batch step, which every Slurm since 20.11 sets; `squeue` and `scontrol`
are asked only where a decision needs them. Each may be out of reach (inside a container, on a site that hides them):
callers must be able to go on without an answer.

This module imports nothing of Slurm's room, so that rooms below it may ask.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from vaedist.core.errors import UserError

ANSWER_SECONDS = 30.0


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
    def current(cls, environment: Mapping[str, str] = os.environ) -> SlurmJob | None:
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
            node=node_name(environment),
            node_list=environment.get("SLURM_JOB_NODELIST", ""),
            cpus=min(expand_counts(environment.get("SLURM_JOB_CPUS_PER_NODE", "1"))),
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
        return (slurm_output("scontrol", "show", "hostnames", self.node_list) or "").split()

    def state(self) -> str:
        """Such as RUNNING, CANCELLED, PENDING; empty where Slurm does not answer."""
        answer = slurm_output("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={self.number}")
        return next(iter((answer or "").split()), "")

    def idle_gpus(self) -> int:
        """GPUs that this node has although the job has none."""
        if self.gpus:
            return 0
        answer = slurm_output("scontrol", "show", "node", self.node, "--oneliner") or ""
        return sum(int(count) for count in re.findall(r"\bGres=\S*?gpu:(?:[^:,(\s]+:)?(\d+)", answer))

    def preempted(self) -> bool:
        """Whether Slurm takes this job off its nodes for another one, and does not queue it again.

        Such a job, one that it does queue again and one that its user has cancelled are all called COMPLETING; only of
        this one it says when it was preempted (22.05).
        """
        answer = slurm_output("scontrol", "--oneliner", "show", "job", self.number) or ""
        return re.search(r"\bPreemptTime=\d", answer) is not None


@dataclass(frozen=True)
class SlurmTask:
    """This process's place in the step that srun started.

    Attributes:
        name: Of the step's start, different for every one: job, step and restart count.
        rank, world: Its number among all tasks.
        local_rank, local_world: The same on its node.
        nodes: Nodes of the step.
    """

    name: str
    rank: int
    world: int
    local_rank: int
    local_world: int
    nodes: int

    @classmethod
    def current(cls, environment: Mapping[str, str] = os.environ) -> SlurmTask:
        """Read from the variables of srun.

        Raises:
            UserError: this process is not a task of a step.
        """
        try:
            number = {
                name: int(environment[f"SLURM_{name}"])
                for name in ("JOB_ID", "STEP_ID", "PROCID", "NTASKS", "LOCALID", "NODEID", "STEP_NUM_NODES")
            }
            per_node = expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
        except (KeyError, ValueError):
            raise UserError(
                "--engine srun is for processes that srun starts, and this is none (no SLURM_PROCID): put srun "
                "before the command, or start it with sbatch jobs/NAME.sh or vaedist-launch"
            ) from None
        return cls(
            name=f"{number['JOB_ID']}.{number['STEP_ID']}.{environment.get('SLURM_RESTART_COUNT', '0')}",
            rank=number["PROCID"],
            world=number["NTASKS"],
            local_rank=number["LOCALID"],
            local_world=per_node[number["NODEID"]],
            nodes=number["STEP_NUM_NODES"],
        )


# Single facts about this process ----------------------------------------------------------------------------


def job_start(environment: Mapping[str, str] = os.environ) -> tuple[str, str, int]:
    """Cluster, job id and restart count of the job that this process belongs to; empty texts and 0 outside one."""
    restarts = environment.get("SLURM_RESTART_COUNT", "")
    cluster, job = (environment.get(f"SLURM_{name}", "") for name in ("CLUSTER_NAME", "JOB_ID"))
    return cluster, job, int(restarts) if restarts.isdecimal() else 0


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """Slurm's name of this node; empty outside a job."""
    return environment.get("SLURMD_NODENAME", "")


def is_first_node(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process runs on the first node of its step, or outside one."""
    return environment.get("SLURM_NODEID", "0") == "0"


def launch_address(environment: Mapping[str, str] = os.environ) -> str | None:
    """Address of the node that started the step of this process; None outside one."""
    return environment.get("SLURM_LAUNCH_NODE_IPADDR")


def node_address(node: str) -> str:
    """The address or host name that Slurm has for a node; empty where scontrol is not in reach."""
    answer = slurm_output("scontrol", "show", "node", node, "--oneliner") or ""
    return "".join(re.findall(r"\bNodeAddr=(\S+)", answer)[:1])


def expand_counts(text: str) -> list[int]:
    """Slurm's short form of a number per node, such as `4(x2),3`, as a list: 4, 4, 3."""
    counts = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


# Slurm's commands -------------------------------------------------------------------------------------------


def why_job_is_gone(cluster: str, job: str) -> str | None:
    """The proof that no process of a job runs, in words; None if there is none.

    Slurm not answering, an error, or a Slurm of another cluster is no proof.
    """
    config = slurm_output("scontrol", "show", "config") or ""
    names = [line.partition("=")[2].strip() for line in config.splitlines() if line.startswith("ClusterName")]
    if not cluster or names != [cluster]:
        return None
    answer = slurm_command("squeue", "--noheader", "--format=%T", f"--jobs={job}")
    if answer is None:
        return None
    if answer.returncode != 0:
        unknown = "Invalid job id" in answer.stdout + answer.stderr
        return f"Slurm no longer knows job {job}" if unknown else None
    states = set(answer.stdout.split())
    if not states:
        return f"Slurm job {job} has ended"
    # Pending again after a requeue: Slurm has taken back the node that the earlier start ran on.
    return f"Slurm job {job} is not running" if states == {"PENDING"} else None


def slurm_command(
    *command: str,
    seconds: float = ANSWER_SECONDS,
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
) -> subprocess.CompletedProcess[str] | None:
    """What a command of Slurm's answers; None where it is not there, or does not answer in time."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, env=environment, cwd=folder
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def slurm_output(
    *command: str, seconds: float = ANSWER_SECONDS, environment: Mapping[str, str] | None = None
) -> str | None:
    """What a command of Slurm's prints; None also where it refuses."""
    answer = slurm_command(*command, seconds=seconds, environment=environment)
    return answer.stdout if answer is not None and answer.returncode == 0 else None


def environment_without(*prefixes: str, keep: Collection[str] = ("SLURM_CONF",)) -> dict[str, str]:
    """This process's environment for a command, without variables that it would take for its own settings."""
    return {
        name: value for name, value in os.environ.items() if name in keep or not name.startswith(prefixes)
    }


def log(text: str) -> None:
    """One line of ours in the log of a job."""
    print(f"vaedist: {text}", file=sys.stderr, flush=True)
