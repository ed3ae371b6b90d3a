"""The first process of a node: it makes the place the node's own, runs slurmd, and buries orphans."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from pathlib import Path

from testbed.machine import HOST, Settings, command, munged, stop, wait_for

MS_NOSUID, MS_NODEV, MS_BIND = 2, 4, 4096


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()):
        error = ctypes.get_errno()
        stop(f"mounting {target} on this node: {os.strerror(error)}")


def run_node(folder: Path, settings: Settings, name: str) -> int:
    """Process 1 of a node: waits for its cable, makes the place its own, runs slurmd, and buries orphans."""
    if sys.stdin.readline() != "go\n":
        return 1
    socket.sethostname(name)
    words = [
        f"address add {settings.address(name)}/24 dev eth0",
        "link set dev lo up",
        "link set dev eth0 up",
    ]
    # Nothing is routed beyond the machine; programs ask for the way out to learn their own address.
    command(
        "ip",
        "-batch",
        "-",
        text="\n".join([*words, f"route add default via 10.213.{settings.subnet}.{HOST}"]),
    )

    if settings.own_tmp:
        own_tmp([str(folder), *settings.shared])
    mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=2g")
    mount("tmpfs", f"{folder}/scratch", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={settings.scratch}m")
    for ours, theirs in (("hosts", "/etc/hosts"), ("resolv.conf", "/etc/resolv.conf"), ("", "/etc/slurm")):
        if Path(theirs).exists():
            mount(str(folder / "etc" / ours), os.path.realpath(theirs), flags=MS_BIND)

    mount("tmpfs", f"{folder}/munge", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m")
    subprocess.Popen(munged(folder, f"munged-{name}"))
    wait_for("munged", Path(f"{folder}/munge/munge.sock").exists, 60)
    slurmd = subprocess.Popen(["slurmd", "-D", "-N", name, "-f", str(folder / "etc" / "slurm.conf")])
    while True:
        pid, status = os.wait()
        if pid == slurmd.pid:
            return os.waitstatus_to_exitcode(status)


def own_tmp(shared: list[str]) -> None:
    """An empty /tmp, as a node of a cluster has it, with the shared folders back in their places."""
    kept = [(path, os.open(path, os.O_PATH)) for path in shared if path.startswith("/tmp/")]
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=4g")
    for path, descriptor in kept:
        os.makedirs(path, exist_ok=True)
        mount(f"/proc/self/fd/{descriptor}", path, flags=MS_BIND)
        os.close(descriptor)
