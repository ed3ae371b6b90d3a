"""Which processes a batch job starts, on how many nodes, under which engine.

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
from dataclasses import dataclass, replace
from pathlib import Path

from vaedist.cli.train_options import build_parser
from vaedist.config.job import load_job
from vaedist.config.site import Site
from vaedist.core.errors import UserError
from vaedist.slurm.batch_job import SlurmJob
from vaedist.slurm.srun_command import srun_command

RAY_NODES_MODULE = "vaedist.launchers.ray.nodes"
"""What a batch job of several nodes runs in a step of its own: a Ray cluster over them."""
RAY_END_FILE = "end"
"""The file in that step's folder which asks the cluster to end."""


@dataclass(frozen=True)
class ProcessLayout:
    """What runs in the job.

    Attributes:
        command: The process that the supervisor waits for.
        summary: One line for the log.
        run_folder: Where the stop file belongs; None: the command is stopped by a signal.
        attempt: Name of this start, which the stop file holds.
        ray_cluster: Folder of the Ray cluster over all nodes that it needs, or None.
        restartable: Whether it is started again in this job when a rank was lost.
    """

    command: list[str]
    summary: str
    run_folder: Path | None = None
    attempt: str = ""
    ray_cluster: Path | None = None
    restartable: bool = False


def plan_processes(
    job: SlurmJob, site: Site, options: argparse.Namespace, command: list[str]
) -> ProcessLayout:
    """What to start for a command of vaedist.

    Args:
        options: Of the supervisor.
        command: The command line that runs it in one process.

    Raises:
        UserError: what was asked for does not go together in this job.
    """
    if options.verb == "train":
        return _train(job, site, options, command)
    if options.verb == "tune" and job.nodes > 1:
        cluster = Path.cwd() / f".vaedist-{job.marker}"
        return ProcessLayout(command, f"on {job.nodes} nodes, Ray", ray_cluster=cluster)
    return ProcessLayout(command, f"on {job.node}")


def _train(job: SlurmJob, site: Site, options: argparse.Namespace, command: list[str]) -> ProcessLayout:
    asked = train_arguments(options.arguments)
    if asked is None:
        return ProcessLayout(command, f"on {job.node}")
    if asked.new_run:
        raise UserError("--new-run would begin anew after every requeue: name a fresh folder with --run-dir")
    ranks_per_node = options.ranks_per_node or job.ranks_per_node()
    engine = asked.engine or options.engine or site.engine or ("srun" if job.nodes > 1 else "local")
    if asked.workers and engine != "ray":
        if job.nodes > 1:
            raise UserError(
                "--workers counts the processes of one machine, and this job has "
                f"{job.nodes} nodes: use --ntasks-per-node of sbatch, or --ranks-per-node"
            )
        engine = "local"
    if job.nodes > 1 and engine == "local":
        raise UserError(
            f"--engine local trains on one machine, and this job has {job.nodes} nodes: use srun or ray"
        )
    run_folder = asked.run_dir or Path("runs") / load_job(asked.job, asked.settings).name
    # Of an option that is given twice the last one counts.
    train = [*command, "--run-dir", str(run_folder), "--engine", engine]
    nodes = "1 node" if job.nodes == 1 else f"{job.nodes} nodes"
    layout = ProcessLayout(
        train, f"{nodes} x {ranks_per_node} ranks, engine {engine}", run_folder, secrets.token_hex(4)
    )
    if engine == "srun":
        return replace(layout, command=srun_command(job, ranks_per_node) + train, restartable=True)
    ranks = job.nodes * ranks_per_node
    workers = asked.workers or (ranks if ranks > 1 or engine == "ray" else None)
    if workers:
        train += ["--workers", ":".join(map(str, workers)) if isinstance(workers, tuple) else str(workers)]
    if engine == "ray" and job.nodes > 1:
        return replace(layout, ray_cluster=run_folder / f".cluster-{job.marker}", restartable=True)
    return layout


def train_arguments(arguments: Sequence[str]) -> argparse.Namespace | None:
    """vaedist-train's command line; None where it does not train (`--help`, a mistake): the command itself answers."""
    parser = build_parser()
    parser.set_defaults(engine=None)  # to tell an engine that was asked for from the default
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
