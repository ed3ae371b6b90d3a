"""The testbed of one folder: a switch, slurmctld with its munged on this machine, and the nodes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from testbed.machine import (
    HOST,
    MARK,
    ROLE,
    Settings,
    command,
    ip,
    links_of,
    munged,
    network,
    number_inside,
    processes,
    quote,
    stop,
    wait_for,
)

SUBNETS = 254  # 10.213.1.0 to 10.213.254.0
TEMPLATE = Path(__file__).with_name("slurm.conf")
SCRIPT = Path(__file__).resolve().parents[1] / "slurm_testbed"


class Testbed:
    """The testbed of one folder; every method may be called again after whatever went wrong."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.conf = folder / "etc" / "slurm.conf"

    def spawn(self, role: str, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start one of our processes: in a session of its own, marked, its output in a log, at ordinary priority
        (a daemon that starves is a node that is down; jobs get the submitter's niceness)."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SALLOC"))}
        environment |= {MARK: str(self.folder), ROLE: role, "SLURM_CONF": str(self.conf)}
        with open(self.folder / "log" / f"{role}.out", "ab") as log:
            return subprocess.Popen(
                words,
                stdin=options.pop("stdin", subprocess.DEVNULL),
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment,
                start_new_session=True,
                preexec_fn=lambda: os.setpriority(os.PRIO_PROCESS, 0, 0),
            )

    def pids(self, role: str) -> list[int]:
        return [pid for pid, theirs in processes(self.folder).items() if theirs == role]

    def node(self, name: str) -> int:
        """The first process of a node, 0 if it is off."""
        return next((pid for pid in self.pids(name) if number_inside(pid) == 1), 0)

    def kill(self, *roles: str) -> None:
        """SIGKILL, and wait: the kernel takes a node's network, mounts and processes down with its first process."""

        def gone() -> bool:
            alive = [pid for pid, role in processes(self.folder).items() if not roles or role in roles]
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not alive

        wait_for(f"the end of {', '.join(roles) or 'all processes'}", gone, 60)

    def save(self) -> None:
        """Keep the settings; a reader sees the old ones or the new ones."""
        path = self.folder / "testbed.json"
        path.with_suffix(".new").write_text(json.dumps(asdict(self.settings), indent=2) + "\n")
        path.with_suffix(".new").replace(path)

    # Files

    def write_files(self) -> None:
        settings, folder = self.settings, self.folder
        for name in ("etc", "run", "munge", "state", "spool", "dev", "scratch"):
            (folder / name).mkdir(exist_ok=True)
        key = folder / "run" / "munge.key"
        if not key.exists():
            with open(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "wb") as file:
                file.write(secrets.token_bytes(128))
        for gpu in range(settings.gpus):  # a character device that is harmless: another /dev/null
            if not (folder / "dev" / f"nvidia{gpu}").exists():
                os.mknod(folder / "dev" / f"nvidia{gpu}", 0o020666, os.makedev(1, 3))

        network = f"10.213.{settings.subnet}"
        hosts = [f"{settings.address(name)} {name}" for name in settings.names]
        hosts += ["127.0.0.1 localhost", f"{network}.{HOST} {socket.gethostname()}"]
        (folder / "etc" / "hosts").write_text("\n".join(hosts) + "\n")
        # With no name server in the file libc asks 127.0.0.1, where none answers: an error at once, no time-out.
        (folder / "etc" / "resolv.conf").write_text("# no name server: this node has no way out\n")
        gpus = settings.gpus
        device = f"{folder}/dev/nvidia{f'[0-{gpus - 1}]' if gpus > 1 else 0}"
        (folder / "etc" / "gres.conf").write_text(f"Name=gpu File={device}\n" if gpus else "")
        (folder / "etc" / "cgroup.conf").write_text(f"CgroupPlugin={cgroup_plugin()}\n")
        lines = [
            f"NodeName={name} NodeHostname={name} NodeAddr={settings.address(name)} CPUs={settings.cpus}"
            f" RealMemory={settings.memory}{f' Gres=gpu:{gpus}' if gpus else ''} State=UNKNOWN"
            for name in settings.names
        ]
        self.conf.write_text(
            TEMPLATE.read_text().format(
                cluster=f"testbed{self.hash}",
                host=socket.gethostname().split(".")[0],
                network=network,
                port=21000 + settings.subnet,
                folder=folder,
                user_signal="SlurmctldParameters=preempt_send_user_signal" if settings.user_signal else "",
                gpus="GresTypes=gpu" if gpus else "",
                nodes="\n".join(lines),
                extra="\n".join(settings.config),
            )
        )

    # Starting

    def start_switch(self) -> None:
        """A network namespace with a bridge. Our end of the one cable into it is all that this machine sees of the
        network, and its name, which only one testbed can have, claims the addresses."""
        if self.pids("switch") and self.cable in links_of(self.folder):
            return
        self.kill()  # without their switch all others are lost
        for name in links_of(self.folder):
            ip(f"link delete dev {name}", may_fail=True)
        process = self.spawn("switch", "unshare", "--net", "sleep", "infinity")
        switch, here = process.pid, network(os.getpid())
        self.wait_beside(process, "switch", lambda: network(switch) not in ("", here))
        first = self.settings.subnet or int(self.hash, 16)
        for subnet in (1 + (first - 1 + further) % SUBNETS for further in range(SUBNETS)):
            self.settings = replace(self.settings, subnet=subnet)
            if f" 10.213.{subnet}." not in ip("address show"):
                ip(f"link add {self.cable} type veth peer name host netns {switch}", may_fail=True)
            if Path("/sys/class/net", self.cable).exists() and ip("link show host", switch, may_fail=True):
                break
        else:
            stop("all networks 10.213.1.0 to 10.213.254.0 are taken, or this kernel has no veth (`ip link`)")
        self.save()
        ip(f"link set dev {self.cable} alias {self.folder}")
        ip(f"address add 10.213.{self.settings.subnet}.{HOST}/24 dev {self.cable}")
        ip(f"link set dev {self.cable} up")
        ip("link add bridge type bridge", switch)
        ip("link set dev bridge up", switch)
        ip("link set dev host master bridge up", switch)

    @property
    def hash(self) -> str:
        return hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]

    @property
    def cable(self) -> str:
        return f"slurmbed{self.settings.subnet}"

    def start_munged(self) -> None:
        if self.pids("munged"):
            return
        socket_file = self.folder / "munge" / "munge.sock"
        socket_file.unlink(missing_ok=True)  # of a killed one
        process = self.spawn("munged", *munged(self.folder, "munged"))
        self.wait_beside(process, "munged", socket_file.exists)

    def start_slurmctld(self) -> None:
        """On this machine, with the nodes' view of names: it finds who waits for an answer on a node, and with
        NoCtldInAddrAny it listens on the testbed's network alone."""
        if not self.pids("slurmctld"):
            shell = 'mount --bind "$0" /etc/hosts && exec slurmctld -D -f "$1"'
            words = ["sh", "-c", shell, str(self.folder / "etc" / "hosts"), str(self.conf)]
            self.spawn("slurmctld", "unshare", "--mount", "--propagation", "private", *words)

    def start_node(self, name: str) -> None:
        if self.node(name):
            return
        self.kill(name)  # halves of an interrupted start
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        unshare = (
            "unshare --net --uts --ipc --mount --pid --fork --kill-child --mount-proc --propagation private"
        )
        words = [sys.executable, str(SCRIPT), "_node", "--dir", str(self.folder), name]
        process = self.spawn(name, *unshare.split(), *words, stdin=subprocess.PIPE)
        pid = self.wait_beside(process, name, lambda: self.node(name))
        switch = self.pids("switch")[0]
        ip(f"link delete dev {name}", switch, may_fail=True)  # the last life's cable may hang on for a moment
        ip(f"link add {name} type veth peer name eth0 netns {pid}", switch)
        ip(f"link set dev {name} master bridge up", switch)
        assert process.stdin is not None
        process.stdin.write(b"go\n")  # an end of file instead ends it: a half started node is none
        process.stdin.close()

    def wait_beside(self, process: subprocess.Popen[bytes], role: str, ready: Callable[[], Any]) -> Any:
        """Wait for what a new process does, and not on if it ended."""
        log = self.folder / "log" / f"{role}.out"

        def alive_and_ready() -> Any:
            if process.poll() is not None:
                stop(f"{role} ended{quote(log)}")
            return ready()

        return wait_for(role, alive_and_ready, 60, log)

    def wait_ready(self, names: list[str]) -> None:
        logs = self.folder / "log"

        def ready() -> bool:
            roles = set(processes(self.folder).values())
            for role, log in {
                "slurmctld": "slurmctld.out",
                **{name: f"{name}.out" for name in names},
            }.items():
                if role not in roles:
                    stop(f"{role} ended{quote(logs / log)}")
            states = self.states()
            return all(re.match(r"(idle|mixed|allocated|completing)$", states.get(n, "")) for n in names)

        wait_for(f"Slurm on {', '.join(names)}", ready, 120, logs / "slurmctld.log")

    def states(self) -> dict[str, str]:
        """Slurm's word on each node; a `*` at the end: it does not answer. Empty while slurmctld does not."""
        if not self.pids("slurmctld"):
            return {}
        done = self.slurm("sinfo", "--noheader", "--Node", "--partition=debug", "--format=%N %T")
        return dict(line.split() for line in done.stdout.splitlines())

    def bury(self, names: list[str]) -> None:
        """Tell slurmctld of dead nodes that it has not missed yet: started again they would look as if nothing had
        happened, and their jobs would be waited for until their time is up."""
        states = self.states()
        for name in names:
            if not self.node(name) and not states.get(name, "down").startswith(("down", "unk")):
                self.slurm("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=it lost power")

    def slurm(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"SLURM_CONF": str(self.conf)}
        return subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    def up(self) -> None:
        (self.folder / "log").mkdir(exist_ok=True)
        self.bury(self.settings.names)
        self.start_switch()
        self.write_files()
        self.start_munged()
        self.start_slurmctld()
        for name in self.settings.names:
            self.start_node(name)
        self.wait_ready(self.settings.names)

    # Ending

    def down(self) -> None:
        self.kill()
        for name in links_of(self.folder):  # they go with the switch, but in the kernel's own time
            ip(f"link delete dev {name}", may_fail=True)
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        left = [f"process {pid} ({role})" for pid, role in processes(self.folder).items()]
        left += [f"network link {name}" for name in links_of(self.folder)]
        left += [f"mount {point}" for point in mounts if point.startswith(f"{self.folder}/")]
        if left:
            stop(f"still there: {'; '.join(left)}; the folder {self.folder} was kept")
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.folder)


def cgroup_plugin() -> str:
    """One that does nothing: nothing here uses cgroups, but slurmd loads a plugin, and the one for version 2 asks for
    systemd. Before `disabled` came, the one for version 1 was as idle, whatever the machine has."""
    version = re.search(r"(\d+)\.(\d+)", command("slurmd", "-V"))
    return "disabled" if version and tuple(map(int, version.groups())) >= (23, 11) else "cgroup/v1"


def read_settings(folder: Path) -> Settings:
    try:
        kept = json.loads((folder / "testbed.json").read_text())
    except FileNotFoundError:
        stop(f"there is no testbed in {folder}; `up` makes one, --dir names another folder")
    # Another version of this program may have kept more.
    return Settings(**{name: value for name, value in kept.items() if name in Settings.__dataclass_fields__})
