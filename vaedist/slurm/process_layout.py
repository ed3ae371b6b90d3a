"""What a batch job starts: which processes, on how many nodes, under which engine.

| ranks | started as |
|---|---|
| one, or several on one node | `vaedist-train`, from the batch script |
| on several nodes, or with `--engine srun` | `srun vaedist-train --engine srun`: a process each, and no cluster |
| with `--engine ray` on several nodes | `vaedist-train --engine ray` on a Ray cluster in a step of this job |

A node has as many ranks as the job has GPUs there, else `--ntasks-per-node`, else one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaedist.cli.train_options import build_parser
from vaedist.config.job import load_job
from vaedist.config.site import Site
from vaedist.core.errors import UserError
from vaedist.slurm.batch_job import SlurmJob

RAY_NODES = "vaedist.launchers.ray.nodes"
"""The module that a batch job of several nodes runs in a step of its own: a Ray cluster over them."""
RAY_END = "end"
"""The file in that step's folder which asks the cluster to end."""


@dataclass(frozen=True)
class Plan:
    """What runs in the job.

    Attributes:
        command: The process that this one waits for.
        told: One line for the log.
        run_folder: Where the stop file belongs; None: the command is stopped by a signal.
        attempt: Name of this start, which the stop file holds.
        cluster: Folder of the Ray cluster over all nodes that it needs, or None.
        again: Whether it is started again, here, when a rank was lost.
    """

    command: list[str]
    told: str
    run_folder: Path | None = None
    attempt: str = ""
    cluster: Path | None = None
    again: bool = False


def plan(job: SlurmJob, site: Site, options: argparse.Namespace, command: list[str]) -> Plan:
    """The plan for a verb.

    Args:
        options: Of the supervisor.
        command: The verb's own command line.

    Raises:
        UserError: what was asked for does not go together in this job.
    """
    if options.verb == "train":
        return _train(job, site, options, command)
    if options.verb == "tune" and job.nodes > 1:
        cluster = Path.cwd() / f".vaedist-{job.marker}"
        return Plan(command, f"on {job.nodes} nodes, Ray", cluster=cluster)
    return Plan(command, f"on {job.node}")


def _train(job: SlurmJob, site: Site, options: argparse.Namespace, command: list[str]) -> Plan:
    asked = train_arguments(options.arguments)
    if asked is None:
        return Plan(command, f"on {job.node}")
    if asked.new_run:
        raise UserError("--new-run would begin anew after every requeue: name a fresh folder with --run-dir")
    each = options.ranks_per_node or job.ranks_per_node()
    engine = asked.engine or options.engine or site.engine or ("srun" if job.nodes > 1 else "local")
    if asked.workers and engine != "ray":
        if job.nodes > 1:
            raise UserError(
                "--workers counts the processes of one machine, and this job has "
                f"{job.nodes} nodes: use --ntasks-per-node of sbatch, or --ranks-per-node"
            )
        engine = "local"
    world = job.nodes * each
    attempt = secrets.token_hex(4)
    run_folder = asked.run_dir or Path("runs") / load_job(asked.job, asked.settings).name
    # Of an option that is given twice the last one counts.
    train = [*command, "--run-dir", str(run_folder), "--engine", engine]
    common: dict[str, Any] = {"run_folder": run_folder, "attempt": attempt}
    nodes = "1 node" if job.nodes == 1 else f"{job.nodes} nodes"
    told = f"{nodes} x {each} ranks, engine {engine}"
    if engine == "srun":
        step = srun(job, each) + train
        return Plan(step, told, again=True, **common)
    if job.nodes > 1 and engine == "local":
        raise UserError(
            f"--engine local trains on one machine, and this job has {job.nodes} nodes: use srun or ray"
        )
    workers = asked.workers or (world if world > 1 or engine == "ray" else None)
    if workers:
        train += ["--workers", ":".join(map(str, workers)) if isinstance(workers, tuple) else str(workers)]
    if engine == "ray" and job.nodes > 1:
        return Plan(train, told, cluster=run_folder / f".cluster-{job.marker}", again=True, **common)
    return Plan(train, told, **common)


def srun(job: SlurmJob, tasks_per_node: int, nodes: int | None = None) -> list[str]:
    """The head of a step on the nodes of the job: every number said, because srun inherits only some of them."""
    nodes = nodes or job.nodes
    return [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--cpus-per-task={max(1, job.cpus // tasks_per_node)}",
        "--kill-on-bad-exit=1",
        "--overlap",  # for each: Slurm 22.05 finds no CPU for a step beside one that does not say so
    ]


def train_arguments(arguments: Sequence[str]) -> argparse.Namespace | None:
    """vaedist-train's command line; None where it is not one that trains, and the door itself answers."""
    parser = build_parser()
    parser.set_defaults(engine=None)  # was one asked for?
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            known = parser.parse_intermixed_args(list(arguments))
    except SystemExit:
        return None
    return None if known.print_job or known.summary else known
