"""What is removed and, above all, what is not: real processes, and what Slurm may answer.

`squeue` is a stand-in here, for the answers that no Slurm gives on request; tests/real_slurm/test_cleanup.py asks a
real one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from vaedist.slurm.cleanup import JobStart, clean_node

SLEEP = "import time; print('here', flush=True); time.sleep(120)"


class Node:
    """This machine, as a node on which job 5 asks: who is marked with a cluster that only this test has."""

    def __init__(self, folder: Path, exits: contextlib.ExitStack) -> None:
        self.folder, self.exits = folder, exits
        self.cluster = f"test.{uuid.uuid4().hex[:8]}"
        self.answer("RUNNING 0")

    def answer(self, mine: str | None, *others: str, completing: str = "", code: int = 0) -> None:
        """What squeue says: of job 5, of others on the node (`JobID JobArrayID STATE RESTARTS`), of completing jobs."""
        lines = [*([f"5 5 {mine}"] if mine else []), *others]
        text = "\\n".join(lines)
        script = self.folder / "squeue"
        script.write_text(
            "#!/bin/sh\n"
            'test -z "$SQUEUE_PARTITION$SLURM_CLUSTERS" || exit 1\n'
            f"case \"$*\" in *COMPLETING*) printf '{completing}';; *--nodelist=n1*) printf '{text}\\n';; esac\n"
            f"exit {code}\n"
        )
        script.chmod(0o755)

    def process(self, marker: str | None, code: str = SLEEP, **variables: str) -> subprocess.Popen[str]:
        """A process that says `here` and sleeps."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "VAEDIST"))
        }
        marked = {} if marker is None else {"VAEDIST_JOB": marker}
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment | marked | variables,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.exits.callback(process.communicate)
        self.exits.callback(process.kill)
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        return process

    def clean(self) -> str:
        return str(clean_node(f"{self.cluster}.5.0", "n1"))


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    short = tempfile.mkdtemp(prefix="sw", dir="/tmp")  # temporary folders of ours must be short
    monkeypatch.setattr(tempfile, "tempdir", short)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("VAEDIST_JOB", raising=False)
    with contextlib.ExitStack() as exits:
        exits.callback(shutil.rmtree, short)
        yield Node(tmp_path, exits)


def is_alive(process: subprocess.Popen[str]) -> bool:
    return process.poll() is None


@pytest.mark.parametrize(
    ("marker", "start"),
    [
        ("c.17.0", JobStart("c", "17", 0)),
        ("a.dotted.name.17_3.12", JobStart("a.dotted.name", "17_3", 12)),
        ("c.17", None),
        (".17.0", None),
        ("c..0", None),
        ("c.17.x", None),
        ("", None),
    ],
)
def test_what_a_marker_names(marker: str, start: JobStart | None) -> None:
    assert JobStart.of_marker(marker) == start


def test_what_slurm_wrote_counts_for_more_than_an_inherited_marker() -> None:
    inherited = {"VAEDIST_JOB": "c.17.2"}
    assert JobStart.of_process(inherited) == JobStart("c", "17", 2)
    assert JobStart.of_process({"SLURM_JOB_ID": "18"}) is None, "not ours"
    slurm = {"SLURM_JOB_ID": "18", "SLURM_CLUSTER_NAME": "c"}
    assert JobStart.of_process(inherited | slurm) == JobStart("c", "18", 0)
    array = slurm | {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "1"}
    assert JobStart.of_process(inherited | array) == JobStart("c", "16_3", 1)


def test_a_job_that_slurm_no_longer_has_here_is_ended_and_nothing_else(node: Node) -> None:
    dead = node.process(f"{node.cluster}.7.0")
    family = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}])\n{SLEEP}"
    parent = node.process(f"{node.cluster}.7.1", family)
    living = [
        node.process(f"{node.cluster}.5.0"),  # ours
        node.process(f"{node.cluster}.8.0"),
        node.process(f"{node.cluster}.9_2.0"),
        node.process(f"{node.cluster}.12.0"),
        node.process("another.7.0"),
        node.process(None),
        node.process("nonsense"),
        node.process(f"{node.cluster}.7.0", SLURM_JOB_ID="8", SLURM_CLUSTER_NAME=node.cluster),
    ]
    node.answer("RUNNING 0", "8 8 RUNNING 0", "11 9_2 SUSPENDED 0", "12 12+0 RUNNING 0")
    report = node.clean()
    assert report.startswith("killed ") and f"{dead.pid} " in report and f"{parent.pid} " in report
    assert "processes of job 7:" in report and "2 processes of job 7 (restart 1):" in report
    assert dead.wait(10) == parent.wait(10) == -9
    assert all(map(is_alive, living))
    assert node.clean() == ""


def test_earlier_starts_of_a_job_are_ended(node: Node) -> None:
    mine, neighbours = node.process(f"{node.cluster}.5.0"), node.process(f"{node.cluster}.8.1")
    now, newer = node.process(f"{node.cluster}.5.1"), node.process(f"{node.cluster}.8.2")
    node.answer("RUNNING 1", "8 8 RUNNING 2")
    assert "job 5: " in str(clean_node(f"{node.cluster}.5.1", "n1"))
    assert mine.wait(10) == neighbours.wait(10) == -9
    assert is_alive(now) and is_alive(newer)


@pytest.mark.parametrize("where", ["here", "anywhere"])
def test_a_job_that_is_completing_is_left_to_slurm(node: Node, where: str) -> None:
    saving = node.process(f"{node.cluster}.7.0")
    row = "7 7 COMPLETING 1"  # requeued: the count is the next start's already
    node.answer("RUNNING 0", *([row] if where == "here" else []), completing=row)
    assert node.clean() == "" and is_alive(saving)


@pytest.mark.parametrize(
    "answer",
    [
        {"mine": None},
        {"mine": "COMPLETING 0"},
        {"mine": "RUNNING 1"},
        {"mine": "PENDING 0"},
        {"mine": "RUNNING 0", "code": 1},
        {"mine": "RUNNING"},
        {"mine": "RUNNING none"},
    ],
)
def test_without_an_answer_to_be_relied_on_nobody_is_ended(node: Node, answer: dict[str, object]) -> None:
    stray = node.process(f"{node.cluster}.7.0")
    node.answer(**answer)  # type: ignore[arg-type]
    assert node.clean() == "" and is_alive(stray)


def test_without_slurm_nobody_is_ended(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    stray = node.process(f"{node.cluster}.7.0")
    monkeypatch.setenv("PATH", "/nowhere")
    assert node.clean() == ""
    monkeypatch.undo()
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    assert not clean_node(f"{node.cluster}.5.0") and not clean_node("nonsense", "n1")
    assert is_alive(stray)


def test_a_persons_settings_of_squeue_hide_no_job(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    stray = node.process(f"{node.cluster}.7.0")
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    monkeypatch.setenv("SLURM_CLUSTERS", "other")
    assert "of job 7" in node.clean()
    assert stray.wait(10) == -9


HOLD = (
    """
import mmap, os
mapped = []
for path in os.environ["HELD"].split():
    file = open(path, "w+b")
    file.truncate(4096)
    mapped.append(mmap.mmap(file.fileno(), 4096))
    file.close()
"""
    + SLEEP
)


def test_shared_memory_goes_with_the_last_who_has_it(node: Node) -> None:
    names = [f"/dev/shm/vdtest-{uuid.uuid4().hex}" for _ in range(3)]
    alone, both, others = map(Path, names)
    node.exits.callback(lambda: [path.unlink(missing_ok=True) for path in (alone, both, others)])
    node.process(f"{node.cluster}.7.0", HELD=f"{alone} {both}", code=HOLD)
    node.process(f"{node.cluster}.5.0", HELD=f"{both} {others}", code=HOLD)
    assert f"; removed {alone}" in node.clean()
    assert [path.exists() for path in (alone, both, others)] == [False, True, True]


def test_shared_memory_that_nobody_has_open(node: Node) -> None:
    mark = uuid.uuid4().hex
    old, young, used, data = (
        Path(f"/dev/shm/{name}-{mark}") for name in ("nccl-a", "nccl-b", "nccl-c", "mine")
    )
    node.exits.callback(lambda: [path.unlink(missing_ok=True) for path in (old, young, used, data)])
    for path in (old, young, used, data):
        path.write_bytes(bytes(4096))
        os.utime(path, (1, 1))
    os.utime(young)
    with used.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 4096)
    assert str(old) in node.clean()
    assert [path.exists() for path in (old, young, used, data)] == [False, True, True, True]
    mapped.close()


def test_temporary_folders_whose_owner_has_gone(node: Node) -> None:
    place, prefix = Path(tempfile.gettempdir()), f"vd-{os.getuid()}-"
    for name in ("left", "held"):
        (place / f"{prefix}{name}").mkdir()
    (place / "vd-other").mkdir()
    hold = (
        f"import fcntl, os\nfcntl.flock(os.open('{place}/{prefix}held', os.O_RDONLY), fcntl.LOCK_EX)\n{SLEEP}"
    )
    node.process(f"{node.cluster}.5.0", hold)
    assert node.clean() == f"removed {place}/{prefix}left"
    assert sorted(path.name for path in place.iterdir()) == [f"{prefix}held", "vd-other"]


def test_jobs_that_start_at_once_leave_each_other_their_folder(node: Node) -> None:
    """A folder has its name only when it is held: a cleanup in that very moment must not take it."""
    make = """
import sys
from vaedist.core.temporary_folder import temporary_folder
import tempfile
tempfile.tempdir = sys.argv[1]
for _ in range(100):
    with temporary_folder() as folder:
        (folder / "file").touch()
print("well")
"""
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", make, tempfile.gettempdir()], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [maker.communicate(timeout=100)[0] for maker in makers] == ["well\n", "well\n"]
    assert list(Path(tempfile.gettempdir()).iterdir()) == []
