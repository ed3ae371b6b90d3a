"""The run's lock with real processes: who is refused, what counts as proof, and what a robbed holder may still do.

Slurm's answers come from two small scripts on PATH that print what Slurm 22.05 prints; the rest is the real thing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vaedist.core.errors import UserError
from vaedist.runs.run_lock import RunLock

HOLDER = """
import sys
from pathlib import Path
from vaedist.core.errors import UserError
from vaedist.runs.run_lock import RunLock
try:
    lock = RunLock.acquire(Path(sys.argv[1]))
except UserError as error:
    print("refused:", error, flush=True)
    sys.exit(2)
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


def environment(**extra: str) -> dict[str, str]:
    """Ours without what a Slurm allocation may have left in it."""
    return {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")} | extra


@contextlib.contextmanager
def contender(folder: Path, *prefix: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that tries to take the lock, and what it says of it; it keeps the lock until its input ends."""
    command = [*prefix, sys.executable, "-c", HOLDER, str(folder)]
    package = str(Path(__file__).parents[2])
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=package,
        env=environment(**variables),
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGKILL)


def verdict(folder: Path, *prefix: str, **variables: str) -> str:
    with contender(folder, *prefix, **variables) as (_, said):
        return said


def owner(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "lock").read_text())
    return content


def rewrite(folder: Path, **changes: Any) -> None:
    (folder / "lock").write_text(json.dumps(owner(folder) | changes))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def _outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key in os.environ if key.startswith("SLURM_")]:
        monkeypatch.delenv(key)


def test_the_second_process_is_refused_with_the_name_of_the_holder(tmp_path: Path) -> None:
    with contender(tmp_path, SLURM_JOB_ID="77") as (holder, said):
        assert said == "held"
        message = verdict(tmp_path)
        assert message.startswith("refused:")
        for part in (f"process {holder.pid} on {os.uname().nodename}", "Slurm job 77", "scancel 77"):
            assert part in message
        assert f"remove {tmp_path / 'lock'}" in message
        assert holder.stdin is not None
        holder.stdin.close()
        assert holder.wait(30) == 0
    assert files(tmp_path) == [], "released, and no temporary file left"
    assert verdict(tmp_path) == "held"


def test_a_killed_holder_is_succeeded_even_before_it_is_reaped(tmp_path: Path) -> None:
    with contender(tmp_path) as (holder, said):
        assert said == "held"
        holder.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie of ours
        assert verdict(tmp_path) == "held"
    assert verdict(tmp_path) == "held"
    assert files(tmp_path) == ["lock"]


def test_another_process_with_the_holders_pid_is_not_the_holder(tmp_path: Path) -> None:
    lock = RunLock.acquire(tmp_path)
    assert verdict(tmp_path).startswith("refused")
    rewrite(tmp_path, started=owner(tmp_path)["started"] - 1)
    assert verdict(tmp_path) == "held"
    with pytest.raises(UserError, match=r"no longer ours \(process \d+ on"):
        lock.check()
    lock.release()
    assert files(tmp_path) == ["lock"], "a lock that is not ours was released"


NAMESPACES = (("--mount-proc",), ())


@pytest.fixture(params=NAMESPACES, ids=["own proc", "foreign proc"])
def elsewhere(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The command that runs another one in a new PID namespace, with or without its own /proc."""
    command = ("unshare", "--pid", "--fork", "--kill-child", *request.param)
    if subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        pytest.skip("a new PID namespace needs root")
    return command


def test_a_holder_in_another_pid_namespace_is_not_judged_by_its_pid(
    tmp_path: Path, elsewhere: tuple[str, ...]
) -> None:
    with contender(tmp_path, *elsewhere) as (holder, said):
        assert said == "held"
        # Its pid is 1: here that is another process, started at another time, and proves nothing.
        assert owner(tmp_path)["pid"] == 1
        assert verdict(tmp_path).startswith("refused: the run")
        assert verdict(tmp_path, *elsewhere).startswith("refused: the run"), "a third namespace"
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()
    assert verdict(tmp_path).startswith("refused: the run"), "gone, but that cannot be seen from here"
    (tmp_path / "lock").unlink()
    assert verdict(tmp_path) == "held"


def test_nor_is_ours_from_within_one(tmp_path: Path, elsewhere: tuple[str, ...]) -> None:
    with contender(tmp_path) as (_, said):
        assert said == "held"
        assert verdict(tmp_path, *elsewhere).startswith("refused: the run")


def test_a_restart_of_the_machine_is_proof_only_on_that_machine(tmp_path: Path) -> None:
    RunLock.acquire(tmp_path)
    if not owner(tmp_path)["machine"]:
        pytest.skip("this machine has no /etc/machine-id, so a restart looks like another machine")
    rewrite(tmp_path, boot="an earlier one", host="another")
    assert verdict(tmp_path).startswith("refused")
    rewrite(tmp_path, host=os.uname().nodename, machine="another with our name")
    assert verdict(tmp_path).startswith("refused")
    os.unlink(tmp_path / "lock")
    RunLock.acquire(tmp_path)
    rewrite(tmp_path, boot="an earlier one")
    assert verdict(tmp_path) == "held"


def on_another_node(tmp_path: Path, **changes: Any) -> None:
    """A lock as a Slurm job on another machine leaves it."""
    (tmp_path / "lock").unlink(missing_ok=True)
    RunLock.acquire(tmp_path)
    slurm = {"slurm_cluster": "hpc", "slurm_job": "77", "slurm_restarts": 0}
    rewrite(tmp_path, **{"host": "n7", "machine": "m7", "boot": "b7", **slurm, **changes})


def test_the_successor_of_a_requeued_job_takes_over(tmp_path: Path) -> None:
    job = {"SLURM_CLUSTER_NAME": "hpc", "SLURM_JOB_ID": "77"}
    on_another_node(tmp_path)
    assert verdict(tmp_path, **job).startswith("refused"), "another step of the same start"
    assert verdict(tmp_path, **job | {"SLURM_JOB_ID": "78"}, SLURM_RESTART_COUNT="1").startswith("refused")
    assert verdict(tmp_path, **job | {"SLURM_CLUSTER_NAME": "hpc2"}, SLURM_RESTART_COUNT="1").startswith(
        "refused"
    )
    assert verdict(tmp_path, **job, SLURM_RESTART_COUNT="1") == "held"
    on_another_node(tmp_path, slurm_restarts=2)
    assert verdict(tmp_path, **job, SLURM_RESTART_COUNT="1").startswith("refused"), "the older one came late"


@pytest.mark.parametrize(
    ("squeue", "expected"),
    [
        ("echo RUNNING", "refused"),
        ("echo COMPLETING", "refused"),
        ("echo PENDING", "held"),
        ("true", "held"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "held"),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "refused"),
    ],
)
def test_slurm_may_say_that_the_job_has_gone(tmp_path: Path, squeue: str, expected: str) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {
        "scontrol": "echo 'Configuration data as of 2026-11-21'; echo 'ClusterName             = hpc'",
        "squeue": f'case "$*" in *--jobs=77*) {squeue} ;; *) echo RUNNING ;; esac',
    }
    for name, body in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    run = tmp_path / "run"
    run.mkdir()
    on_another_node(run, slurm_cluster="hpc2")
    assert verdict(run, PATH=path).startswith("refused"), "this Slurm cannot speak for another cluster"
    on_another_node(run, user=os.getuid() + 1)
    assert verdict(run, PATH=path).startswith("refused"), "a site may hide other users' jobs"
    on_another_node(run)
    assert verdict(run, PATH=path).startswith(expected)

    # A holder seen alive in our own process table counts for more than its stale job number.
    (run / "lock").unlink()
    RunLock.acquire(run)
    rewrite(run, slurm_cluster="hpc", slurm_job="77")
    assert verdict(run, PATH=path).startswith("refused")


def test_of_many_that_find_a_stale_lock_one_takes_it(tmp_path: Path) -> None:
    RunLock.acquire(tmp_path)
    rewrite(tmp_path, started=1)
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-c", HOLDER, str(tmp_path)]
        package = str(Path(__file__).parents[2])
        rivals = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=package,
                    env=environment(),
                )
            )
            for _ in range(8)
        ]
        said = [rival.stdout.readline().split(":")[0].strip() for rival in rivals if rival.stdout]
        assert sorted(said) == ["held"] + ["refused"] * 7
        assert owner(tmp_path)["pid"] == rivals[said.index("held")].pid
    assert files(tmp_path) == []


def test_a_takeover_that_was_killed_half_way_does_not_bar_the_next(tmp_path: Path) -> None:
    lock = RunLock.acquire(tmp_path)
    rewrite(tmp_path, started=1)
    claim = owner(tmp_path) | {"token": "claim"}
    (tmp_path / f"lock.{lock.token}").write_text(json.dumps(claim))
    assert verdict(tmp_path) == "held"
    assert files(tmp_path) == ["lock"]


def test_a_file_that_is_no_lock_is_named(tmp_path: Path) -> None:
    for content in ("", "{}", "[1]", '{"token": 1, "extra": 2}'):
        (tmp_path / "lock").write_text(content)
        with pytest.raises(UserError, match=r"is not a lock that this vaedist wrote.*remove it"):
            RunLock.acquire(tmp_path)
    assert files(tmp_path) == ["lock"]


def test_a_folder_that_takes_no_lock_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot make the lock of the run .*nowhere: No such file"):
        RunLock.acquire(tmp_path / "nowhere")


def test_a_lock_in_a_folder_that_has_become_read_only_is_left(tmp_path: Path) -> None:
    """What went wrong is on its way to the user; that the lock cannot be removed must not take its place."""
    lock = RunLock.acquire(tmp_path)
    if subprocess.run(["chattr", "+i", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("only root may make a folder immutable, and not on every filesystem")
    try:
        lock.release()
    finally:
        subprocess.run(["chattr", "-i", str(tmp_path)], check=True)
    assert files(tmp_path) == ["lock"]
    lock.release()
    assert files(tmp_path) == []


def test_workers_check_what_their_launcher_holds(tmp_path: Path) -> None:
    with RunLock.acquire(tmp_path) as lock:
        worker = RunLock.holding(tmp_path, lock.token)
        worker.check()
    with pytest.raises(UserError, match=r"no longer ours.*removed"):
        worker.check()


SLEEPER = """
import sys
from pathlib import Path
from tests.runs.test_checkpoint import a_state
from vaedist.core.errors import UserError
from vaedist.runs.checkpoint import Checkpoints
from vaedist.runs.run_lock import RunLock
folder = Path(sys.argv[1])
lock = RunLock.acquire(folder)
store = Checkpoints(folder)
step = int(sys.argv[2])
store.newest()
print("held", flush=True)
for line in sys.stdin:
    step += 1
    try:
        print(store.commit(a_state(step), step, guard=lock.check).name, flush=True)
    except UserError as error:
        print("refused:", error, flush=True)
        break
lock.release()
"""


def test_a_stopped_holder_that_wakes_after_a_takeover_cannot_commit(tmp_path: Path, repository: Path) -> None:
    def start(step: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", SLEEPER, str(tmp_path), str(step)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=repository,
            env=environment(),
        )

    def ask(process: subprocess.Popen[str]) -> str:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("go on\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    with start(0) as old:
        assert old.stdout is not None and old.stdout.readline() == "held\n"
        assert ask(old) == "step-000000001"
        old.send_signal(signal.SIGSTOP)
        assert verdict(tmp_path).startswith("refused"), "a stopped holder is no proof that it has gone"
        (tmp_path / "lock").unlink()  # by hand, as the message says
        with start(10) as new:
            assert new.stdout is not None and new.stdout.readline() == "held\n"
            assert ask(new) == "step-000000011"
            old.send_signal(signal.SIGCONT)
            said = ask(old)
            assert said.startswith("refused:") and f"process {new.pid}" in said
            assert old.wait(30) == 0
            assert ask(new) == "step-000000012", "the woken holder took the lock away from the new one"
    assert files(tmp_path / "checkpoints") == [f"step-0000000{step}" for step in ("01", "11", "12")]
