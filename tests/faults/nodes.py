"""`vaedist-train` on a cluster of two real Ray nodes on this machine, one CPU each; a test kills the second one.

The first is a private cluster. The second has a raylet, an object store and workers of its own, as `ray start` makes
them; the command itself would not use the loopback address. `WITNESS/raylet` holds the process id of its raylet; when
that has been killed, the file `WITNESS/return` has another node started, and is then taken away.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

from vaedist.launchers.ray.cluster import cluster
from vaedist.train import main


def second_node(witness: Path) -> Any:
    """Start it, as a part of the cluster."""
    import ray
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    parameters = RayParams(
        gcs_address=ray.get_runtime_context().gcs_address,
        node_ip_address="127.0.0.1",
        num_cpus=1,
        num_gpus=0,
        memory=1 << 30,
        object_store_memory=128 << 20,
        min_worker_port=0,
        max_worker_port=0,
        include_log_monitor=False,
    )
    node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
    raylet = node.all_processes["raylet"][0].process
    (witness / ".raylet").write_text(str(raylet.pid))
    (witness / ".raylet").replace(witness / "raylet")
    return node


def follow(witness: Path, node: Any, over: threading.Event) -> None:
    """Let a node come back when the test says so; end it with the run."""
    while not over.wait(0.2):
        if (witness / "return").exists():
            node.kill_all_processes(check_alive=False, allow_graceful=False)  # what the raylet left behind
            node = second_node(witness)
            (witness / "return").unlink()
    node.kill_all_processes(check_alive=False, allow_graceful=False)


if __name__ == "__main__":
    place, ended = Path(os.environ["WITNESS"]), threading.Event()
    with cluster(cpus=1):
        following = threading.Thread(target=follow, args=(place, second_node(place), ended))
        following.start()
        try:
            code = main(sys.argv[1:])
        finally:
            ended.set()
            following.join()
    raise SystemExit(code)
