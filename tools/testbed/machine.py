"""What the testbed's parts share: its settings, and how its processes, links and sockets are named and found."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

MARK, ROLE = "SLURM_TESTBED", "SLURM_TESTBED_ROLE"
"""Environment of every process of ours: the folder, and munged, slurmctld, switch or the node's name. This, not a file
of process numbers, is how they are found again: a number may be reused, and a file outlives what it tells of."""
HOST = 254
"""Last number of this machine's address in the testbed's network, where slurmctld listens; nodes have 1 to 99."""


def stop(sentence: str) -> NoReturn:
    sys.exit(f"slurm_testbed: {sentence}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def command(*words: str, text: str | None = None, may_fail: bool = False) -> str:
    """The output of a command; its complaint is ours."""
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    if done.returncode and not may_fail:
        stop(f"{' '.join(words)}: {(done.stderr or done.stdout).strip() or f'exit {done.returncode}'}")
    return done.stdout


def ip(line: str, network_of: int | str = "self", may_fail: bool = False) -> str:
    """`ip` in the network of a process."""
    inside = ["nsenter", f"--net=/proc/{network_of}/ns/net", "--"]
    return command(*inside, "ip", *line.split(), may_fail=may_fail)


def wait_for(what: str, ready: Callable[[], Any], seconds: float, log: Path | None = None) -> Any:
    """What `ready` returns as soon as it is true; the log is quoted if that does not come."""
    deadline = time.monotonic() + seconds
    while not (value := ready()):
        if time.monotonic() > deadline:
            stop(f"{what} did not come within {seconds:.0f} s{quote(log) if log else ''}")
        time.sleep(0.05)
    return value


def quote(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-12:] if log.exists() else ["(no such file)"]
    return "".join(f"\n    {line}" for line in [f"the end of {log}:", *lines])


@dataclass(frozen=True)
class Settings:
    """What `up` was asked for, kept in FOLDER/testbed.json."""

    nodes: int = 2
    cpus: int = 4
    gpus: int = 2
    memory: int = 64000  # MiB, as Slurm counts it; nothing enforces it
    scratch: int = 1024  # MiB, of the node's scratch folder
    user_signal: bool = False
    own_tmp: bool = False
    shared: list[str] = field(default_factory=list)
    config: list[str] = field(default_factory=list)
    subnet: int = 0  # 0: none chosen yet

    @property
    def names(self) -> list[str]:
        return [f"n{i}" for i in range(1, self.nodes + 1)]

    def address(self, node: str) -> str:
        return f"10.213.{self.subnet}.{node[1:]}"


def processes(folder: Path) -> dict[int, str]:
    """Every process of this testbed but this one, with its role."""
    wanted = f"{MARK}={folder}".encode()
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or entry.name == str(os.getpid()):
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # gone, or not ours to read
            continue
        if wanted in variables:
            roles = [v.split(b"=", 1)[1].decode() for v in variables if v.startswith(ROLE.encode() + b"=")]
            found[int(entry.name)] = roles[0] if roles else "?"
    return found


def number_inside(pid: int) -> int:
    """A process's number in its own process table: 1 for the first of a node."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    inside = next((line.split()[1:] for line in lines if line.startswith("NSpid:")), [])
    return int(inside[-1]) if len(inside) > 1 else 0


def network(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def links_of(folder: Path) -> list[str]:
    """This machine's network links that carry the folder's name."""
    found = []
    for link in Path("/sys/class/net").iterdir():
        with contextlib.suppress(OSError):  # gone meanwhile
            if (link / "ifalias").read_text().strip() == str(folder):
                found.append(link.name)
    return found


def munged(folder: Path, name: str) -> list[str]:
    """The command line of the private munged of one machine: the common key, a socket of its own."""
    files = {"socket": "munge/munge.sock", "pid-file": "munge/munged.pid", "seed-file": "munge/munged.seed"}
    files |= {"key-file": "run/munge.key", "log-file": f"log/{name}.log"}
    return [
        "munged",
        "--foreground",
        "--force",
        *(f"--{option}={folder}/{file}" for option, file in files.items()),
    ]
