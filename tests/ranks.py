"""Real processes for tests of what happens between ranks: one Python per rank, gloo on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


_LEAVE = """
import os
import sys
sys.stdout.flush()
os._exit(0)
"""
"""As the door ends a rank: torch's threads can abort a Python that is finalising."""


def run_ranks(source: str, world: int, *arguments: str, timeout: float = 120.0) -> list[str]:
    """Run `source` once per rank (`sys.argv[1:]` = arguments); the ranks' outputs, after all ended well."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listener.set_inheritable(True)
        processes = []
        for rank in range(world):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            }
            if rank == 0:
                environment["VAEDIST_STORE_FD"] = str(listener.fileno())
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", source + _LEAVE, *arguments],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    pass_fds=(listener.fileno(),) if rank == 0 else (),
                )
            )
    outputs = []
    try:
        for rank, process in enumerate(processes):
            out, err = process.communicate(timeout=timeout)
            assert process.returncode == 0, f"rank {rank} of {world}:\n{err}"
            outputs.append(out)
    finally:
        for process in processes:
            process.kill()
    return outputs
