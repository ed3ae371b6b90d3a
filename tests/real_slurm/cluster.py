"""What tests see of the test cluster (tools/slurm_testbed): jobs by number, nodes by name."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "slurm_testbed"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
KILL_WAIT = 5.0
"""Seconds between SIGTERM and SIGKILL on the test cluster."""


def until(what: str, ready: Callable[[], object], seconds: float, every: float = 0.25) -> None:
    """Wait for something to come true; the test fails if it does not."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds:.0f} s")
        time.sleep(every)


class Slurm:
    """A running testbed.

    `environment` is this process's without any Slurm variable and with SLURM_CONF; `nodes` are n1 and n2; `scratch` is
    the folder that each node has for itself. Every job is a number as text, as `sbatch --parsable` gives it.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.scratch = folder / "scratch"
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SALLOC"))}
        self.environment = ours | {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}
        self.lost_power = False
        self.tool("up", *options)
        self.nodes = self.run("sinfo", "-hN", "-pdebug", "-o%N").split()
        self._fresh = {thing for node in self.nodes for thing in self._things(node)}

    # Commands

    def tool(self, verb: str, *words: str) -> str:
        """`tools/slurm_testbed VERB --dir FOLDER WORDS...`; what it prints on stdout."""
        self.lost_power |= verb == "kill-node"
        return self._output([str(TOOL), verb, "--dir", str(self.folder), *words], 200)

    def run(self, *words: str, seconds: float = 60, check: bool = True, cwd: Path | None = None) -> str:
        """A command (srun, squeue, scontrol...) on the machine that jobs are submitted from."""
        return self._output(list(words), seconds, check, cwd)

    def on(self, node: str, *words: str, check: bool = True, seconds: float = 60) -> str:
        """A command on a node."""
        return self._output([str(TOOL), "exec", "--dir", str(self.folder), node, *words], seconds, check)

    def _output(self, words: list[str], seconds: float, check: bool = True, cwd: Path | None = None) -> str:
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=seconds, check=False, cwd=cwd
        )
        told = f"{' '.join(words)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert not check or done.returncode == 0, told
        return done.stdout

    # Jobs

    def sbatch(
        self, *words: str | Path, environment: dict[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """Submit, as `sbatch("-N2", script, "argument")` or `sbatch("--wrap", "hostname")`; the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, words)],
            env=self.environment | (environment or {}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=cwd,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().split(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`, for 15 minutes after its end too; of a job array the first line's."""
        line = self.run("scontrol", "-o", "show", "job", job).splitlines()[0]
        return dict(re.findall(r"(?:^|\s)([A-Za-z/:]+)=(\S*)", line))

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def restarts(self, job: str) -> int:
        return int(self.show(job)["Restarts"])

    def nodes_of(self, job: str) -> list[str]:
        """The nodes of a running job."""
        return self.run("scontrol", "show", "hostnames", self.show(job)["NodeList"]).split()

    def output(self, job: str) -> str:
        """What the job wrote so far, stdout (and stderr, unless it went elsewhere)."""
        path = Path(self.show(job)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, job: str, *states: str, seconds: float = 60) -> str:
        """Until the job is in one of the states (without any: at its end); a job that ended otherwise fails the test
        at once, with what it wrote."""
        wanted = states or ENDED
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in wanted:
            if time.monotonic() > deadline or state in ENDED:
                pytest.fail(f"job {job}: {state}, waited for {wanted}: {self.show(job)}\n{self.output(job)}")
            time.sleep(0.25)
        return state

    def release(self, job: str, seconds: float = 30) -> None:
        """Spare a requeued job the two minutes that Slurm lets it wait."""
        until(f"job {job} is queued again", lambda: self.state(job) == "PENDING", seconds)
        # A job that starts in the very second of its requeue fails: "Job credential revoked" (22.05 counts in seconds).
        # And slurmctld takes 2 s to give up telling a dead node that the job ended there: if the job runs again by
        # then, it is counted one node short, and its srun hangs. No job that waits its two minutes meets either.
        time.sleep(4 if self.lost_power else 2)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def preempt(self, job: str, seconds: float = 60) -> None:
        """Take a job of the partition `low` or `lowgrace` off all of its nodes: returns when it is queued again and the
        job that took its place is gone. `release` lets it start again."""
        nodes = self.nodes_of(job)
        words = ["--partition=high", "--exclusive", f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}"]
        other = self.sbatch(*words, "--job-name=other", "--output=/dev/null", "--wrap=sleep 600")
        self.wait(other, "RUNNING", seconds=seconds)
        self.run("scancel", other)
        self.wait(other, "CANCELLED", seconds=KILL_WAIT + 25)
        until(f"job {job} is queued again", lambda: self.state(job) == "PENDING", seconds)

    # The cluster

    @contextmanager
    def user_signal(self) -> Iterator[None]:
        """With SlurmctldParameters=preempt_send_user_signal inside the block."""
        self.tool("reconfigure", "--user-signal", "on")
        try:
            yield
        finally:
            self.tool("reconfigure", "--user-signal", "off")

    def left(self, node: str) -> list[str]:
        """What jobs left on a node: processes, files in /dev/shm and in its own /tmp, listening TCP sockets."""
        return [thing for thing in self._things(node) if thing not in self._fresh]

    def _things(self, node: str) -> list[str]:
        listed = self.on(node, "ps", "-e", "-o", "args=").splitlines()
        found = [f"process {words.strip()}" for words in listed if not words.startswith("ps -e")]
        for folder in (Path("/dev/shm"), Path("/tmp")):
            names = self.on(node, "ls", "-A", str(folder)).splitlines()
            # An empty folder that torch makes for each user, and for good, whenever an optimizer is made.
            found += [str(folder / name) for name in names if not name.startswith("torchinductor_")]
        return found + [f"socket {line.split()[3]}" for line in self.on(node, "ss", "-Hltn").splitlines()]

    def quiet(self, seconds: float = 30) -> None:
        """Cancel every job and wait until all nodes are idle."""
        self.run("scancel", "--user=root")
        until("an empty queue", lambda: not self.run("squeue", "-h"), seconds)
        until("idle nodes", lambda: set(self.run("sinfo", "-hN", "-o%T").split()) == {"idle"}, seconds)

    @staticmethod
    def end(folder: Path) -> None:
        """Take a testbed down; its tool says what it could not remove."""
        subprocess.run(
            [str(TOOL), "down", "--dir", str(folder)], check=True, timeout=200, capture_output=True
        )
