"""A Ray cluster over the nodes of one Slurm job, in a step of that job.

The supervisor (`vaedist.slurm.supervisor`) starts `srun python -m vaedist.launchers.ray.nodes FOLDER`, a process per
node; the one with `SLURM_NODEID` 0 is the head. They exchange everything through FOLDER (0700, seen by all nodes):

| file | written by | holds |
|---|---|---|
| `nodes` | supervisor | the names of the nodes |
| `token` (0600) | head | the cluster's token; never in an argument, an environment or a log |
| `head` | head | where its GCS listens |
| `at-NAME` | each node | its address |
| `end` | supervisor | nothing: the cluster is no longer needed |

All ports are 0: each of Ray's processes binds one that the kernel gives it and tells the others, so two jobs that start
on one node in the same second cannot collide; the head reads its own from the file that Ray writes. Addresses are the
node's own on the job's network. There is no dashboard, no Ray client port and no autoscaler.

`ray start --block` runs as a child in a short private folder, and the process ends with it, when `end` appears, or on
TERM, with everything that was started in that folder: no `ray stop`, which would also end the user's other jobs on the
node.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vaedist.core.errors import EXIT_FINISHED, EXIT_STOPPED, UserError, cli_command
from vaedist.core.files import exists_uncached, replace_private, wait_for_file
from vaedist.core.temporary_folder import temporary_folder
from vaedist.launchers.allocation import allocation
from vaedist.launchers.environment import python_path, temporary_environment
from vaedist.launchers.network import gloo_interface, node_address
from vaedist.launchers.ray.cluster import PRIVATE_RAY_ENV, RAY_ENV
from vaedist.slurm.batch_job import is_first_node, node_name
from vaedist.slurm.cleanup import clean_this_node
from vaedist.slurm.process_layout import RAY_END_FILE

GATHER_SECONDS = 180.0
"""How long nodes have to come: a cold Python on a network disk takes a minute before Ray even starts."""


_TRIES = 3


def _token(folder: Path) -> dict[str, str]:
    """Variables with which Ray's processes find the cluster's token, and this package."""
    path = str(folder / "token")
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": path, "PYTHONPATH": python_path()}


@cli_command
def main(argv: list[str] | None = None) -> int:
    """One node of the cluster; returns when Ray ends here (1), is no longer needed (0), or on TERM (75)."""
    (folder,) = map(Path, sys.argv[1:] if argv is None else argv)
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    head = is_first_node()
    if not head:
        clean_this_node()  # the supervisor has done so on the first
    address = node_address()
    replace_private(folder / f"at-{node_name() or address}", address)
    if head:
        replace_private(folder / "token", secrets.token_hex(32))
    gcs = None if head else _wait_for(folder / "head", "the head of the Ray cluster")
    variables = RAY_ENV | PRIVATE_RAY_ENV | gloo_interface(address) | _token(folder)
    variables["RAY_START_HOOK"] = f"{__spec__.name}.{without_client.__name__}"
    os.environ.pop("RAY_AUTH_TOKEN", None)
    for left in reversed(range(_TRIES)):
        with temporary_folder() as scratch, temporary_environment(variables):
            started, code = _run(_command(scratch / "r", address, gcs), scratch, folder, head, lambda: ended)
            if code is not None:
                return code
            said = (scratch / "out").read_text(errors="replace").strip().splitlines()[-10:]
            over = started or not left
            what = "Ray ended" if over else "Ray did not start, and is started once more"
            print(f"vaedist: {what} on {address}:\n" + "\n".join(said), file=sys.stderr, flush=True)
            if over:
                return 1
    raise AssertionError


def _run(
    command: list[str], scratch: Path, folder: Path, head: bool, ended: Callable[[], bool]
) -> tuple[bool, int | None]:
    """Run Ray on this node, until it ends or the cluster is no longer needed.

    Args:
        scratch: Its temporary folder, which also takes what it prints.
        folder: The cluster's.

    Returns:
        Whether it had started, and the exit code where this process ended it.
    """
    up = scratch / "r" / "ray_current_cluster"  # written when this node is up
    with (
        (scratch / "out").open("wb") as out,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT) as ray,
    ):
        started, code = False, None
        while ray.poll() is None and code is None:
            time.sleep(0.5)
            if not started and up.exists():
                started = True
                if head:
                    replace_private(folder / "head", up.read_text().strip())
            if ended():
                code = EXIT_STOPPED
            elif exists_uncached(folder / RAY_END_FILE) or not folder.exists():
                code = EXIT_FINISHED
        if code is not None:
            ray.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                ray.wait(3)
            ray.kill()
    return started, code


def without_client(parameters: Any, head: bool) -> None:  # noqa: ARG001 - so Ray calls it
    """What Ray calls before it starts (RAY_START_HOOK): no server for Ray clients, whose port must be a fixed one."""
    parameters.ray_client_server_port = None


def _command(scratch: Path, address: str, gcs: str | None) -> list[str]:
    ours = allocation()
    role = ["--head", "--port=0", "--include-dashboard=false", "--no-monitor"]
    return [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--block",
        "--disable-usage-stats",
        "--include-log-monitor=false",
        f"--node-ip-address={address}",
        f"--num-cpus={ours.cpus}",
        f"--num-gpus={ours.gpus}",
        f"--object-store-memory={ours.object_store}",
        f"--memory={max(ours.memory - ours.object_store, ours.memory // 2)}",
        f"--temp-dir={scratch}",
        *(f"--{name}-port=0" for name in ("min-worker", "max-worker", "node-manager", "object-manager")),
        *(f"--{name}=0" for name in ("dashboard-agent-listen-port", "metrics-export-port")),
        *(role if gcs is None else [f"--address={gcs}"]),
    ]


@contextlib.contextmanager
def join_cluster(folder: Path) -> Iterator[int]:
    """Connect to the cluster of this job, when all its nodes are there; how many they are.

    Args:
        folder: What the supervisor named in VAEDIST_RAY_CLUSTER.

    Raises:
        UserError: nodes are missing after the deadline: their names.
    """
    import logging

    deadline = time.monotonic() + GATHER_SECONDS
    gcs = _wait_for(folder / "head", "the head of this job's Ray cluster")
    names = (folder / "nodes").read_text().split("\n")
    with temporary_environment(RAY_ENV | _token(folder)):
        import ray  # now: it reads whether to use a token when it is loaded

        try:
            ray.init(
                address=gcs, _node_ip_address=node_address(), log_to_driver=False, logging_level=logging.ERROR
            )
        except ConnectionError as error:
            raise UserError(
                f"this job's Ray cluster at {gcs} does not answer ({error}): look at what its nodes say in the log, "
                "and start again"
            ) from None
        try:
            while len(there := _alive()) < len(names):
                if time.monotonic() > deadline:
                    missing = [name for name in names if _address_of(folder, name) not in there]
                    raise UserError(
                        f"of the {len(names)} nodes of this job, {', '.join(missing)} did not join the Ray cluster "
                        f"within {GATHER_SECONDS:.0f} s: look at what they say in the log, and start again"
                    )
                time.sleep(0.5)
            yield len(names)
        finally:
            ray.shutdown()


def _address_of(folder: Path, name: str) -> str:
    with contextlib.suppress(OSError):
        return (folder / f"at-{name}").read_text()
    return "nowhere"


def _alive() -> set[str]:
    import ray

    return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


def _wait_for(file: Path, what: str) -> str:
    text = wait_for_file(file, GATHER_SECONDS)
    if text is None:
        raise UserError(
            f"{what} did not start within {GATHER_SECONDS:.0f} s: look at what it says in the log"
        )
    return text


if __name__ == "__main__":
    raise SystemExit(main())
