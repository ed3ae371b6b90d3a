"""Environment variables of the processes that launchers start."""

from __future__ import annotations

import contextlib
import os
import site
import socket
from collections.abc import Iterator
from pathlib import Path

import vaedist


def python_path() -> str:
    """PYTHONPATH with which another Python finds this vaedist, checkout or installed."""
    home = str(Path(vaedist.__file__).resolve().parents[1])
    path = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if home not in (*path, *site.getsitepackages(), site.getusersitepackages()):
        path.insert(0, home)
    return os.pathsep.join(path)


def loopback_interface() -> dict[str, str]:
    """Makes gloo, on one machine, independent of how its host name resolves; a setting of the user's stays."""
    exists = any(name == "lo" for _, name in socket.if_nameindex())
    return {"GLOO_SOCKET_IFNAME": "lo"} if exists and "GLOO_SOCKET_IFNAME" not in os.environ else {}


def rank_environment(
    ranks: tuple[int, int], local_ranks: tuple[int, int], address: str, port: int
) -> dict[str, str]:
    """What `Group.join` reads, as torchrun sets it.

    Args:
        ranks: This process's rank, and the number of all.
        local_ranks: The same on its node.
        address, port: Where rank 0 listens.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return dict(zip(names, map(str, (*ranks, *local_ranks, address, port)), strict=True))


@contextlib.contextmanager
def temporary_environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables while the block runs; processes started in it inherit them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
