"""One rank of a step that `srun` started: distributed training under Slurm with no cluster of our own.

    srun --ntasks=4 vaedist-train jobs/vqvae_oasis.yaml --engine srun

Slurm starts the processes, numbers them, and kills all when one dies (`--kill-on-bad-exit`). This module makes them
meet, and has a rank that is stopped killed (`vaedist.distributed.liveness`). Rank 0 listens on a port that the kernel
chose, on its node's address and no other. It writes address, port and a secret into a file in the run folder (0600 in a
0700 folder, which every node sees). A program that cannot read the file may reach the port, but cannot prove that it
knows the secret, which every rank asks of every other before the first collective
(`vaedist.distributed.process_group`). The file is removed once all ranks have met.

The file's name holds the numbers of job and step and the restart count, so the file of a killed attempt is never taken
for this one's. `SLURM_*` variables alone, as `salloc` leaves them, do not make a step: only `--engine srun` looks at
them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vaedist.config.job import Job
from vaedist.core.errors import UserError
from vaedist.core.files import replace_private, wait_for_file
from vaedist.distributed.liveness.silence import HANG_SECONDS, watchdog
from vaedist.launchers import local
from vaedist.launchers.environment import loopback_interface, rank_environment
from vaedist.launchers.network import gloo_interface, node_address
from vaedist.launchers.rank_process import fit_rank, signals_as_stop_request
from vaedist.runs.fit_options import FitOptions, Outcome
from vaedist.runs.run_folder import RunFolder
from vaedist.runs.startup_timings import process_start_time
from vaedist.slurm.batch_job import SlurmTask
from vaedist.slurm.cleanup import clean_this_node

RENDEZVOUS_SECONDS = 120.0
"""How long ranks wait for rank 0 to say where it listens: a cold Python on a network disk takes a minute."""

_FOLDER = ".srun"
_RANK_0_FIRST_SECONDS = 3.0


def run(
    job: Job,
    run_folder: Path,
    *,
    device: str = "auto",
    hang_seconds: float = HANG_SECONDS,
    options: FitOptions | None = None,
) -> Outcome:
    """Train as the rank that srun made of this process.

    Args:
        job: The job, the same for all ranks.
        run_folder: Made if missing (0700); every node must see it.
        device: `auto`, `cpu` or `cuda`; a rank takes the GPU of its number on the node, or the one that it sees.
        hang_seconds: How long this process may be stopped, or keep others waiting while its main thread stands still,
            before it is ended; 0: for ever.
        options: What the command asked for.

    Raises:
        UserError: what stopped the run; all ranks raise it, rank 0 first.
    """
    task = SlurmTask.current()
    options = options or FitOptions()
    if task.world == 1:
        return local.run(job, run_folder, workers=1, device=device, options=options)
    if task.world > job.train.batch_size:
        raise UserError(
            f"{task.world} tasks are more than train.batch_size={job.train.batch_size}, so some would have nothing to "
            "do: start fewer tasks, or use a larger batch"
        )
    if task.local_rank == 0 and task.rank > 0:
        clean_this_node()  # the supervisor has done so on the first node
    attempt = options.attempt or task.name
    options = replace(options, engine="srun", attempt=attempt, hang_seconds=hang_seconds)
    RunFolder.make(run_folder)
    try:
        with (
            watchdog(f"rank {task.rank} of {task.world}", hang_seconds) as loaded,
            signals_as_stop_request(run_folder, options.attempt),
            _rendezvous(task, run_folder) as file,
        ):

            def reached(stage: str) -> None:
                if stage == "imported":
                    loaded()
                if stage == "joined":  # all have read it
                    os.environ.pop("VAEDIST_STORE_SECRET")
                    file.unlink(missing_ok=True)

            options = options.with_startup(("imports", process_start_time()))
            return fit_rank(job, run_folder, device, options, reached)
    except UserError:
        if task.rank > 0:
            # Nearly always the same sentence on all ranks; when rank 0 has ended, Slurm ends this one.
            time.sleep(_RANK_0_FIRST_SECONDS)
        raise


@contextlib.contextmanager
def _rendezvous(task: SlurmTask, run_folder: Path) -> Iterator[Path]:
    """Set what `Group.join` reads; gives the file that says where rank 0 listens."""
    address = "127.0.0.1" if task.nodes == 1 else node_address()
    os.environ |= loopback_interface() if task.nodes == 1 else gloo_interface(address)
    # torch warns once per connection where an address has no name, as on many clusters; its errors still come through.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    folder = run_folder / _FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    file = folder / f"{task.name}.json"
    if task.rank == 0:
        listener = socket.create_server((address, 0), backlog=2 * task.world + 8)
        content = {"address": address, "port": listener.getsockname()[1], "secret": secrets.token_hex(32)}
        os.environ["VAEDIST_STORE_FD"] = str(listener.detach())
        replace_private(file, json.dumps(content))
    else:
        text = wait_for_file(file, RENDEZVOUS_SECONDS)
        if text is None:
            raise UserError(
                f"rank {task.rank} waited {RENDEZVOUS_SECONDS:.0f} s for rank 0 to write {file}: look at rank 0's "
                f"messages, and see that {run_folder} is on a file system that all nodes share"
            )
        content = json.loads(text)
    numbers = (task.rank, task.world), (task.local_rank, task.local_world)
    os.environ |= rank_environment(*numbers, content["address"], content["port"])
    os.environ["VAEDIST_STORE_SECRET"] = content["secret"]
    try:
        yield file
    finally:
        if task.rank == 0:
            file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another start's file is in it
                folder.rmdir()
