"""The command line of `srun`: how processes are started on the nodes of a batch job."""

from __future__ import annotations

from vaedist.slurm.batch_job import SlurmJob


def srun_command(job: SlurmJob, tasks_per_node: int, nodes: int | None = None) -> list[str]:
    """The head of a step on the nodes of the job; what runs in it is to be appended.

    Every number is stated, because srun inherits only some of them from the job.
    """
    nodes = nodes or job.nodes
    return [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--cpus-per-task={max(1, job.cpus // tasks_per_node)}",
        "--kill-on-bad-exit=1",
        "--overlap",  # on every step: Slurm 22.05 finds no CPU for a step beside one without it
    ]
