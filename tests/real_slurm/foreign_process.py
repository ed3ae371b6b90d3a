"""What another user of the node can try: becomes nobody, then reads and knocks. `foreign_process.py RUN GCS PLACE...`

RUN is the run folder, GCS the address of Ray's control service or `-`, each PLACE an address and a port at which
something listens; `rank:` before it: a store of ranks. Prints a line for each success, and one at the end.
"""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401 - Python loads it at the first connection, when this is nobody
import os
import socket
import sys
import threading
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore


def _join(address: str, port: int) -> None:
    """As a rank would: the store of the ranks' rendezvous takes words from everybody."""
    with contextlib.suppress(RuntimeError):
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=1), wait_for_workers=False)
        store.set("vaedist/0/here/7", "1")


def main(run: Path, gcs: str, places: list[str]) -> None:
    connect = None
    if gcs != "-":
        # Loaded while this is still allowed.
        from ray._raylet import GcsClient as connect
        from ray.exceptions import AuthenticationError
    secrets = [path for path in (*run.glob(".srun/*"), *run.glob(".cluster-*/*")) if path.is_file()]
    assert secrets or gcs == "-", "there is something to steal"
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    for path in (*secrets, run / "job.yaml", run / "metrics.jsonl"):
        with contextlib.suppress(OSError):
            path.read_bytes()
            print("read", path)
    for place in places:
        address, _, port = place.removeprefix("rank:").rpartition(":")
        address = "127.0.0.1" if address in ("*", "0.0.0.0") else address
        for words in (b"GET / HTTP/1.0\r\n\r\n", os.urandom(64)):
            with contextlib.suppress(OSError), socket.create_connection((address, int(port)), 2) as peer:
                peer.settimeout(0.2)
                peer.sendall(words)
                peer.recv(4096)
        if place.startswith("rank:"):
            trying = threading.Thread(target=_join, args=(address, int(port)), daemon=True)
            trying.start()
            trying.join(5)  # torch waits for ever for what is no store
    if connect is not None:
        with contextlib.suppress(AuthenticationError):
            connect(address=gcs)
            print("joined", gcs)
    print("tried", len(places), flush=True)
    os._exit(0)


main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
