"""tools/slurm_testbed is what its document says: nodes that are apart, Slurm's signals as measured, nothing left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real_slurm.cluster import TOOL, Slurm, until
from tests.real_slurm.conftest import need_slurm

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


# Nodes ----------------------------------------------------------------------------------------------------------


def test_two_nodes_have_two_names_and_two_addresses_that_reach_each_other(
    slurm: Slurm, tmp_path: Path
) -> None:
    # Task 0 listens on the address that its own hostname resolves to, and says so in the shared folder.
    (tmp_path / "talk.py").write_text(
        """
import os, socket, sys, time
name = socket.gethostname()
address = socket.gethostbyname(name)
told = sys.argv[1]
if os.environ["SLURM_PROCID"] == "0":
    with socket.create_server((address, 0)) as server:
        with open(told + ".new", "w") as file:
            file.write(f"{name} {server.getsockname()[1]}")
        os.rename(told + ".new", told)
        connection, (peer, _) = server.accept()
        print(name, address, "hears", connection.recv(100).decode(), "from", peer)
else:
    while not os.path.exists(told):
        time.sleep(0.05)
    host, port = open(told).read().split()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(name.encode())
"""
    )
    words = [sys.executable, str(tmp_path / "talk.py"), str(tmp_path / "told")]
    (said,) = slurm.run("srun", "--nodes=2", *words).splitlines()
    name, address, _, other, _, peer = said.split()
    assert {name, other} == {"n1", "n2"} and address != peer
    assert address.startswith("10.213.") and peer.startswith("10.213.")


def test_a_node_sees_neither_the_processes_nor_the_memory_nor_the_disk_of_another(
    slurm: Slurm, tmp_path: Path
) -> None:
    script = "touch /dev/shm/mine $1/mine /tmp/mine; exec -a strange-name sleep 30"
    alive = slurm.sbatch(
        "--nodelist=n1", "--output=/dev/null", "--wrap", f"bash -c '{script}' - {slurm.scratch}"
    )
    until("its files", lambda: "mine" in slurm.on("n1", "ls", "/tmp"), 60)

    assert "strange-name" in slurm.on("n1", "ps", "ax")
    assert "strange-name" not in slurm.on("n2", "ps", "ax")
    for folder in ("/dev/shm", str(slurm.scratch), "/tmp"):
        assert "mine" in slurm.on("n1", "ls", folder)
        assert "mine" not in slurm.on("n2", "ls", folder)
        assert not Path(folder, "mine").exists()
    assert any("strange-name" in thing for thing in slurm.left("n1"))
    until("nothing on the other node", lambda: slurm.left("n2") == [], 60)

    # Everything else is the machine's.
    slurm.on("n2", "touch", str(tmp_path / "shared"))
    assert (tmp_path / "shared").exists()
    slurm.run("scancel", alive)
    slurm.on("n1", "sh", "-c", f"rm /dev/shm/mine /tmp/mine {slurm.scratch}/mine")


def test_a_node_has_no_way_out_and_says_so_at_once(slurm: Slurm) -> None:
    script = "import socket; socket.getaddrinfo('example.org', 80)"
    begun = time.monotonic()
    said = slurm.on("n1", "sh", "-c", f'{sys.executable} -c "{script}" 2>&1', check=False)
    assert "gaierror" in said
    assert time.monotonic() - begun < 10  # libc would wait 10 s for a name server, twice
    # The way out by which programs learn their own address is there.
    script = (
        "import socket; s = socket.socket(type=2); s.connect(('192.0.2.1', 9)); print(s.getsockname()[0])"
    )
    assert slurm.on("n1", sys.executable, "-c", script).startswith("10.213.")


def test_pretended_gpus_are_counted_and_shared_out(slurm: Slurm) -> None:
    script = "echo $(hostname) $CUDA_VISIBLE_DEVICES $SLURM_GPUS_ON_NODE; sleep 2"
    steps = [
        subprocess.Popen(
            ["srun", "--gres=gpu:1", "--nodelist=n1", "sh", "-c", script],
            env=slurm.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert sorted(step.communicate(timeout=60)[0] for step in steps) == ["n1 0 1\n", "n1 1 1\n"]
    assert slurm.run("srun", "--gres=gpu:2", "-N2", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES") == "0,1\n" * 2
    refused = slurm.run("sbatch", "--test-only", "--gres=gpu:3", "--wrap=true", check=False)
    assert refused == ""


# Signals: the table that engines/batch.py is built to -------------------------------------------------------------

TELLTALE = """#!/bin/bash
# What reaches the batch shell, and what reaches a step.
for name in USR1 TERM; do trap "echo shell $name \\$((SECONDS - begun)) >> $1" $name; done
begun=$SECONDS
srun --overlap bash -c 'for n in USR1 TERM; do trap "echo step $n \\$SECONDS >> $0" $n; done
    touch $0.up; while :; do sleep 0.2; done' $1 &
while :; do sleep 0.2; done
"""


@pytest.fixture
def telltale(tmp_path: Path) -> tuple[Path, Path]:
    """A job that writes which signal reaches whom, and that file."""
    (tmp_path / "telltale.sh").write_text(TELLTALE)
    return tmp_path / "telltale.sh", tmp_path / "signals"


def _preempted(slurm: Slurm, partition: str, telltale: tuple[Path, Path]) -> list[list[str]]:
    script, signals = telltale
    words = [f"--partition={partition}", "--signal=B:USR1@60", "--requeue", "--output=/dev/null"]
    job = slurm.sbatch("-N2", *words, script, signals)
    until("the step", Path(f"{signals}.up").exists, 60)
    slurm.preempt(job)
    assert slurm.restarts(job) == 1
    slurm.run("scancel", job)
    return [line.split() for line in signals.read_text().splitlines()]


@pytest.mark.parametrize(
    ("partition", "user_signal", "first"),
    [
        ("low", False, {"shell TERM", "step TERM"}),
        ("lowgrace", False, {"step TERM"}),
        ("lowgrace", True, {"shell USR1"}),
    ],
)
def test_preemption_warns_whom_it_warned_when_it_was_measured(
    slurm: Slurm, telltale: tuple[Path, Path], partition: str, user_signal: bool, first: set[str]
) -> None:
    if user_signal:
        with slurm.user_signal():
            told = _preempted(slurm, partition, telltale)
    else:
        told = _preempted(slurm, partition, telltale)
    begun = min(int(seconds) for _, _, seconds in told)
    soon = {f"{who} {name}" for who, name, seconds in told if int(seconds) <= begun + 3}
    assert soon == first, told


def test_a_requeued_job_runs_again_as_soon_as_it_is_released(slurm: Slurm, tmp_path: Path) -> None:
    script = (
        'echo "run ${SLURM_RESTART_COUNT:-0} on $(hostname)"; sleep $((60 * (1 - ${SLURM_RESTART_COUNT:-0})))'
    )
    job = slurm.sbatch("--open-mode=append", "--output", tmp_path / "log", "--wrap", script)
    until("its first line", lambda: "run 0" in slurm.output(job), 60)
    slurm.run("scontrol", "requeue", job)
    slurm.release(job)
    assert slurm.wait(job) == "COMPLETED"
    assert slurm.restarts(job) == 1
    assert [line.split()[1] for line in slurm.output(job).splitlines() if line.startswith("run")] == [
        "0",
        "1",
    ]


# Faults -----------------------------------------------------------------------------------------------------------


def test_what_a_job_leaves_behind_is_seen(slurm: Slurm) -> None:
    """linuxproc loses what is re-parented: the harshest case of `scancel` is one that this cluster shows."""
    job = slurm.sbatch("--nodelist=n2", "--output=/dev/null", "--wrap", "setsid sleep 4321 & sleep 1; exit 0")
    assert slurm.wait(job) == "COMPLETED"
    until("the stray process alone", lambda: slurm.left("n2") == ["process sleep 4321"], 60)
    slurm.on("n2", "pkill", "-f", "sleep 4321")
    until("nothing left", lambda: slurm.left("n2") == [], 60)


def test_a_node_that_loses_its_power_loses_its_jobs_and_comes_back(slurm: Slurm, tmp_path: Path) -> None:
    script = "srun sleep $((100 * (1 - ${SLURM_RESTART_COUNT:-0})))"
    job = slurm.sbatch("-N2", "--requeue", "--output", tmp_path / "log", "--wrap", script)
    slurm.wait(job, "RUNNING")
    slurm.tool("kill-node", "n2")
    until("the loss is noticed", lambda: slurm.state(job) == "PENDING", 45)
    assert "down" in slurm.run("sinfo", "-hN", "-pdebug", "-nn2", "-o%T")
    slurm.tool("start-node", "n2")
    slurm.release(job)
    assert slurm.wait(job) == "COMPLETED"

    # A node that is back before slurmctld missed it: its job must not be waited for.
    job = slurm.sbatch("-N2", "--requeue", "--output", tmp_path / "log", "--wrap", "srun sleep 100")
    slurm.wait(job, "RUNNING")
    slurm.tool("kill-node", "n1")
    slurm.tool("start-node", "n1")
    until("the job is queued again", lambda: slurm.state(job) == "PENDING", 60)


# The tool itself: a testbed of one node, beside the other ---------------------------------------------------------


def _machine() -> dict[str, set[str]]:
    """What a testbed could leave on this machine, without what other testbeds have there now."""
    aliases = {
        path.parent.name: path.read_text().strip() for path in Path("/sys/class/net").glob("*/ifalias")
    }
    foreign = {name for name, alias in aliases.items() if alias and not alias.startswith("/tmp/vd-bed-")}
    addresses = subprocess.check_output(["ip", "-o", "address"], text=True).splitlines()
    files = [Path("/etc", name) for name in ("hosts", "resolv.conf", "slurm", "munge", "passwd")]
    return {
        "links": set(aliases) - foreign,
        "namespaces": {path.name for path in Path("/run/netns").glob("*")},
        "mounts": {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()},
        "addresses": {line for line in addresses if line.split()[1] not in foreign},
        "etc": {f"{path} {path.stat().st_mtime_ns}" for path in files if path.exists()},
    }


def _ours(folder: Path) -> dict[int, str]:
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SLURM_TESTBED={folder}\0".encode() in path.read_bytes():
                found[int(path.parent.name)] = (path.parent / "comm").read_text().strip()
        except OSError:
            continue  # gone meanwhile
    return found


def _kill_all(folder: Path) -> None:
    for pid in _ours(folder):
        with contextlib.suppress(ProcessLookupError):  # with a node's first process its others went
            os.kill(pid, signal.SIGKILL)
    until("the end of all", lambda: not _ours(folder), 60)


def _tool(verb: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(TOOL), verb, "--dir", str(folder), *words],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    need_slurm()
    made = Path(tempfile.mkdtemp(prefix="vd-bed-"))
    made.rmdir()  # `up` makes it
    yield made
    _tool("down", made)


SMALL = ("--nodes=1", "--cpus=2", "--gpus=0")


def test_down_leaves_nothing(slurm: Slurm, folder: Path) -> None:
    before = _machine()
    done = _tool("up", folder, *SMALL)
    assert done.stdout == f"export SLURM_CONF={folder}/etc/slurm.conf\n", done.stderr
    beside = {**os.environ, "SLURM_CONF": f"{folder}/etc/slurm.conf"}
    job = ["sbatch", "--output=/dev/null", "--wrap", "setsid sleep 4322 & sleep 100"]
    subprocess.run(job, env=beside, check=True, capture_output=True)
    until("the job", lambda: "sleep 4322" in _tool("exec", folder, "n1", "ps", "ax").stdout, 60)
    assert _machine()["links"] - before["links"], (
        "the testbed has a link, so that its absence tells something"
    )
    assert slurm.run("srun", "-N2", "hostname").split(), "two testbeds live side by side"

    done = _tool("down", folder)
    assert done.returncode == 0 and "nothing is left" in done.stderr, done.stderr
    assert _machine() == before
    assert _ours(folder) == {} and not folder.exists()
    processes = subprocess.check_output(["ps", "-e", "-o", "args="], text=True)
    assert "sleep 4322" not in processes and str(folder) not in processes
    assert _tool("down", folder).returncode == 0, "down twice is harmless"


def test_up_twice_is_harmless_and_other_options_are_refused(slurm: Slurm, folder: Path) -> None:
    assert _tool("up", folder, *SMALL, "--config=MinJobAge=77").returncode == 0
    running = _ours(folder)
    again = _tool("up", folder, *SMALL)
    assert again.returncode == 0 and again.stdout.startswith("export SLURM_CONF=")
    assert _ours(folder) == running and "slurmd" in running.values()
    shown = subprocess.check_output(
        ["scontrol", "show", "config"],
        env={**os.environ, "SLURM_CONF": f"{folder}/etc/slurm.conf"},
        text=True,
    )
    assert "MinJobAge               = 77 sec" in shown

    other = _tool("up", folder, "--nodes=3")
    assert other.returncode == 1 and "--nodes" in other.stderr and "down" in other.stderr
    assert _ours(folder) == running


def test_after_a_kill_of_everything_up_and_down_still_work(slurm: Slurm, folder: Path) -> None:
    before = _machine()
    assert _tool("up", folder, *SMALL).returncode == 0
    _kill_all(folder)
    assert _tool("status", folder).returncode == 1
    again = _tool("up", folder)
    assert again.returncode == 0, again.stderr
    assert _tool("status", folder).returncode == 0
    assert _tool("exec", folder, "n1", "hostname").stdout == "n1\n"

    _kill_all(folder)
    assert _tool("down", folder).returncode == 0
    assert _machine() == before and not folder.exists()


def test_an_up_that_is_killed_half_way_is_finished_by_the_next(slurm: Slurm, folder: Path) -> None:
    before = _machine()
    for role in ("sleep", "slurmctld", "slurmd"):  # the switch, the controller, the node: in this order
        half = subprocess.Popen([str(TOOL), "up", "--dir", str(folder), *SMALL], stderr=subprocess.DEVNULL)
        until(role, lambda wanted=role: wanted in _ours(folder).values(), 60, every=0.01)
        half.kill()
        half.wait()
        if role != "slurmctld":
            done = _tool("up", folder)
            assert done.returncode == 0, done.stderr
        assert _tool("down", folder).returncode == 0
        assert _machine() == before and _ours(folder) == {}


def test_down_finds_a_testbed_whose_folder_was_removed(slurm: Slurm, folder: Path) -> None:
    before = _machine()
    assert _tool("up", folder, *SMALL).returncode == 0
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    assert _ours(folder)
    assert _tool("down", folder).returncode == 0
    assert _ours(folder) == {} and _machine() == before


def test_refusals_name_the_way_out(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    held = _tool("up", tmp_path)
    assert held.returncode == 1 and "holds other files" in held.stderr
    held = _tool("down", tmp_path)
    assert held.returncode == 1 and (tmp_path / "precious").read_text() == "mine"

    long = _tool("up", folder / ("x" * 80))
    assert long.returncode == 1 and "too long" in long.stderr and not folder.exists()

    wrong = _tool("up", folder, *SMALL, "--config=NoSuchKey=1")
    assert wrong.returncode == 1 and "NoSuchKey" in wrong.stderr

    poor = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, str(TOOL), "status"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert poor.returncode == 1 and "root" in poor.stderr
