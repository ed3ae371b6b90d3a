"""What each Ray Train worker runs: one rank of the loop."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from vaedist.config.job import Job
from vaedist.core.errors import UserError
from vaedist.core.files import replace_file
from vaedist.launchers.environment import rank_environment
from vaedist.launchers.rank_process import fit_rank
from vaedist.launchers.ray.driver_log import PROGRAMMING_ERRORS, STALLS_FILE
from vaedist.runs.fit_options import FitOptions

FAILURE_FILE = "failure.json"
"""File in the work folder: the error that ended the run, if it has a name or is a bug."""


def train_worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """Train as one rank; the outcome.

    Args:
        config: Made by the driver (`vaedist.launchers.ray.trainer`).
    """
    import ray.train

    work = Path(config["work"])
    failure = work / FAILURE_FILE
    if failure.exists():
        return None  # a controller on another node may not have seen it yet, and tried again
    os.chdir(config["folder"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    stages = work / "stages.jsonl"
    options = FitOptions(**config["options"])
    if stages.exists():
        options = replace(options, startup=None)  # not the first group

    def reached(stage: str) -> None:
        if rank == 0:
            _append(stages, {"reached": stage, "world": world})

    def report(metrics: dict[str, float]) -> None:
        # Ray takes one report per poll of its controller: every log line would slow a fast model down.
        if any(name.startswith("validation/") for name in metrics):
            ray.train.report(metrics)

    reached("started")
    options = options.with_startup(("imports", time.time()))
    options = replace(
        options, threads=config["threads"] or _cpus_of_node() // context.get_local_world_size() or 1
    )
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with contextlib.ExitStack() as exits:
        if rank == 0:
            console: TextIO = exits.enter_context((work / "console.txt").open("a", buffering=1))
            exits.enter_context(contextlib.redirect_stdout(console))
            exits.enter_context(contextlib.redirect_stderr(console))
        # Ray has put its own handlers on the root logger; ours print the message alone, as under every launcher.
        logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
        logging.getLogger("ray.train").setLevel(logging.WARNING)
        try:
            _rendezvous(rank, world)
            import torch

            outcome = fit_rank(
                Job.model_validate(config["job"]),
                Path(config["run_folder"]),
                # Ray shows each worker the one GPU that is its own.
                torch.device("cuda", 0) if config["cuda"] else "cpu",
                options,
                reached,
                lambda sentence: _append(work / STALLS_FILE, {"rank": rank, "report": sentence}),
                report,
            )
        except (UserError, *PROGRAMMING_ERRORS) as error:
            if not failure.exists():
                what = (
                    {"error": type(error).__name__, "text": str(error)}
                    if isinstance(error, UserError)
                    else {"bug": traceback.format_exc()}
                )
                replace_file(failure, json.dumps({**what, "rank": rank, "at": time.time()}).encode())
            raise
        return asdict(outcome)


def _append(file: Path, message: dict[str, Any]) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(message) + "\n")


def _rendezvous(rank: int, world: int) -> None:
    """Set what `Group.join` reads. Rank 0 listens before it broadcasts the port, so no other program can take it."""
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    place = None
    if rank == 0 and world > 1:
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        listener = socket.create_server((address, 0), backlog=2 * world + 8)
        place = [address, listener.getsockname()[1], secrets.token_hex(32)]
        os.environ["VAEDIST_STORE_FD"] = str(listener.detach())
    address, port, secret = broadcast_from_rank_zero(place) if world > 1 else ("127.0.0.1", 0, "")
    local_ranks = context.get_local_rank(), context.get_local_world_size()
    os.environ |= rank_environment((rank, world), local_ranks, address, port)
    os.environ["VAEDIST_STORE_SECRET"] = secret


def _cpus_of_node() -> int:
    """CPUs of this node as Ray knows them: those of the allocation, where we started Ray."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    (offered,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == here)  # type: ignore[no-untyped-call]
    return int(offered.get("CPU", 1))
