"""Processes that die, stop, run out of memory or meet each other."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.stage import KILLED, SAVE, Stage, only_line
from vaedist.core.errors import OutOfMemory, UserError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
TWO = ("--workers", "2")


def recovered(stage: Stage, out: str, recovery: float) -> None:
    """Note the recovery and its parts: what the launcher told, and the rest, which is detection."""
    found = re.search(r"training again ([\d.]+) s after the loss was noticed: (.*)", out)
    assert found
    stage.note("recovery", recovery)
    detection = max(0.0, recovery - float(found[1]))
    stage.note("parts", f"detection {detection:.1f} s, {found[2]}")


@pytest.mark.ci
@pytest.mark.faults(
    row="F1",
    fault="kill -9 of a rank at a random step",
    ray="notices after 1.6 s, trains again after 22 to 37 s; our recovery under Ray: see the Ray rows",
)
def test_a_killed_rank(stage: Stage, whole_of_two: Stage) -> None:
    step = 11 + secrets.randbelow(14)
    with stage.start(*TWO, hold=step) as training:
        stage.wait_held(training, ranks=2)
        since = time.monotonic()
        training.signal(signal.SIGKILL, rank=1)
        stage.release()
        recovery = stage.until_training(training, since)
        code, out, err = training.end()
    assert code == 0
    told = only_line(err)
    assert "rank 1 of 2 was killed by SIGKILL" in told
    assert "starting again from there (1 of at most 3 times)" in told
    assert stage.starts() == [0, step // SAVE * SAVE], "at most one checkpoint interval is done again"
    recovered(stage, out, recovery)
    stage.note("told", told)
    stage.equals(whole_of_two)


@pytest.mark.faults(
    row="F2",
    fault="kill -9 right after a checkpoint was committed",
    ray="loses a checkpoint reported less than 2 s before the death, for ever",
)
def test_killed_right_after_a_commit(stage: Stage, whole_of_two: Stage) -> None:
    orders = {"place": "after-rename", "path": "step-000000010", "once": str(stage.folder / "once")}
    with stage.start(*TWO, FAULT_KILL=json.dumps(orders)) as training:
        training.wait_until((stage.folder / "once").exists, 600, "be killed")
        stage.now()
        since = time.monotonic()
        recovery = stage.until_training(training, since)
        code, out, err = training.end()
    assert code == 0
    assert "rank 0 of 2 was killed by SIGKILL" in only_line(err)
    assert stage.starts() == [0, 10]
    recovered(stage, out, recovery)
    stage.note("told", only_line(err))
    stage.equals(whole_of_two)


@pytest.mark.faults(
    row="F3",
    fault="SIGSTOP of a rank",
    ray="finds it after 600 s; after 77 s in all with its time-out set to 12 s",
)
def test_a_stopped_rank_is_found_within_a_minute(stage: Stage, whole_of_two: Stage) -> None:
    with stage.start(*TWO, hold=13) as training:
        stage.wait_held(training, ranks=2)
        since = time.monotonic()
        training.signal(signal.SIGSTOP, rank=1)
        stopped = training.rank(1)
        stage.release()
        training.wait_until(lambda: not stopped.is_running(), 60, "find the stopped rank")
        found = time.monotonic() - since
        recovery = stage.until_training(training, since)
        code, out, err = training.end()
    assert code == 0
    assert 40 < found < 60
    assert "rank 1 of 2 did not answer for 45 s (stopped, frozen, or its machine hung)" in only_line(err)
    assert stage.starts() == [0, 10]
    recovered(stage, out, recovery)
    stage.note("told", only_line(err))
    stage.equals(whole_of_two)


@pytest.mark.faults(row="F3c", fault="a rank frozen by its cgroup, which not even kill -9 ends")
def test_a_frozen_rank_is_left_behind(stage: Stage, whole_of_two: Stage) -> None:
    with contextlib.ExitStack() as exits:
        group = exits.enter_context(cgroup("freezer", stage))
        training = exits.enter_context(stage.start(*TWO, "--hang-timeout", "20", hold=13))
        stage.wait_held(training, ranks=2)
        frozen = training.rank(1)
        (group / "cgroup.procs").write_text(str(frozen.pid))
        exits.callback((group / "freezer.state").write_text, "THAWED")
        since = time.monotonic()
        (group / "freezer.state").write_text("FROZEN")
        stage.release()
        recovery = stage.until_training(training, since)
        code, out, err = training.end()
        assert frozen.is_running(), "it is still frozen, and the run has ended without it"
        (group / "freezer.state").write_text("THAWED")
        frozen.wait(10)
    assert code == 0
    assert "rank 1 of 2 did not answer for 20 s" in only_line(err)
    recovered(stage, out, recovery)
    stage.note("told", only_line(err))
    stage.equals(whole_of_two)


@contextlib.contextmanager
def cgroup(controller: str, stage: Stage) -> Iterator[Path]:
    """A control group of our own, of version 1, where this machine lets us make one."""
    group = Path("/sys/fs/cgroup") / controller / f"vaedist-{stage.mark[:8]}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no {controller} cgroup of version 1 can be made here: {error.strerror}")
    try:
        yield group
    finally:
        group.rmdir()


@pytest.mark.faults(
    row="F3d",
    fault="the main thread of a rank loops for ever; its process lives, and so do its other threads",
    ray="finds it when the collective of the others gives up, after 30 minutes",
)
def test_a_main_thread_that_loops_is_found(stage: Stage, whole_of_two: Stage) -> None:
    with stage.start(*TWO, "--hang-timeout", "10", hold=13) as training:
        stage.wait_held(training, ranks=2)
        since = time.monotonic()
        stuck = training.rank(1)
        (stage.witness / "holding-0").unlink()
        recovery = stage.until_training(training, since)
        assert not stuck.is_running()
        code, out, err = training.end()
    assert code == 0, err
    told = only_line(err)
    assert "rank 1 of 2 stood still for 1" in told and "in vaedist.models.witness, line" in told
    assert "(_hold)" in told and "starting again from there (1 of at most 3 times)" in told
    assert stage.starts() == [0, 10]
    traces = (stage.run / "stuck.txt").read_text()
    assert traces.count("rank 1 of 2 stood still") == 1
    assert "witness.py" in traces and "in _hold" in traces
    recovered(stage, out, recovery)
    stage.note("told", told)
    stage.equals(whole_of_two)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.faults(
    row="F3e",
    fault="a rank validates and reads from what never answers; its process lives, and so do its other threads",
    ray="finds it when the collective of the others gives up, after 30 minutes",
)
def test_a_read_that_never_returns_is_found(rank: int, stage: Stage, whole_of_two: Stage) -> None:
    os.mkfifo(stage.witness / "pipe")
    with stage.start(*TWO, "--hang-timeout", "5", WITNESS_READS=str(rank)) as training:
        training.wait_until((stage.witness / f"held-{rank}").exists, 600, "read")
        stage.now()
        since = time.monotonic()
        recovery = stage.until_training(training, since)
        code, out, err = training.end()
    assert code == 0, err
    told = only_line(err)
    assert f"rank {rank} of 2 stood still for 2" in told and "(_validates)" in told
    assert stage.starts() == [0, 5], "the step before the first validation has no checkpoint yet"
    recovered(stage, out, recovery)
    stage.note("told", told)
    stage.equals(whole_of_two)


@pytest.mark.faults(row="F3f", fault="rank 0 computes alone for long while the others wait for it: no fault")
def test_a_rank_that_works_for_long_is_left_alone(stage: Stage, whole_of_two: Stage) -> None:
    """For seven times as long as it might stand still in a step, and nearly twice as long as it might without work."""
    with stage.start(*TWO, "--hang-timeout", "4", WITNESS_WORKS="28") as training:
        code, _, err = training.end(600)
    assert (code, err) == (0, "")
    assert (stage.witness / "worked").exists() and stage.starts() == [0]
    assert not (stage.run / "stuck.txt").exists()
    stage.note("told", "nothing: the run goes on")
    stage.equals(whole_of_two)


@pytest.mark.faults(row="F3b", fault="SIGSTOP of the launcher for longer than its ranks may be silent")
def test_a_stopped_launcher_blames_nobody(stage: Stage, whole_of_two: Stage) -> None:
    with stage.start(*TWO, "--hang-timeout", "10", hold=13) as training:
        stage.wait_held(training, ranks=2)
        since = time.monotonic()
        training.signal(signal.SIGSTOP)
        time.sleep(14)
        training.signal(signal.SIGCONT)
        stage.release()
        training.wait_for_step(14)
        stage.note("recovery", round(time.monotonic() - since - 14, 2))
        ended = training.end()
    assert (ended[0], ended[2]) == (0, "")
    stage.note("told", "nothing: the run goes on")
    stage.equals(whole_of_two)


@pytest.mark.faults(
    row="F4",
    fault="kill -9 of the launcher",
    ray="workers gone after 3 to 6 s, two of its agents still there after 61 s",
)
def test_a_killed_launcher(stage: Stage, whole_of_two: Stage) -> None:
    with stage.start(*TWO, "-q", hold=17) as training:
        stage.wait_held(training, ranks=2)
        everyone = training.everyone()
        assert len(everyone) == 3
        training.signal(signal.SIGKILL)
        assert training.end()[0] == KILLED
        _, alive = psutil.wait_procs(everyone, timeout=5)
        assert alive == []
    stage.release()
    code, out, err = stage.go_on(*TWO)
    assert (code, err) == (0, "")
    assert "resumed" in out or "step-000000015" in out
    assert stage.starts() == [0, 15]
    stage.note("told", "nothing; the same command says from which step it goes on")
    stage.equals(whole_of_two)


@pytest.mark.ci
@pytest.mark.faults(
    row="F9",
    fault="two jobs, one run folder",
    ray="both run and both end well, one overwrites the other",
)
def test_two_jobs_on_one_run_folder(stage: Stage, whole: Stage) -> None:
    with stage.start("-q", hold=12) as training:
        stage.wait_held(training)
        code, out, err = stage.train("-q")
        assert (code, out) == (UserError.exit_code, "")
        told = only_line(err)
        assert f"is being trained by process {training.process.pid} on {os.uname().nodename}" in told
        assert f"kill {training.process.pid}" in told
        stage.release()
        assert training.end() == (0, "", "")
    stage.note("told", told)
    stage.equals(whole)


@pytest.mark.faults(row="M1", fault="a worker asks for memory that a limit refuses (RLIMIT_AS)")
def test_memory_that_is_refused(stage: Stage, whole_of_two: Stage) -> None:
    wants = 4 << 30
    with stage.start(*TWO, hold=12, WITNESS_WANTS=str(wants)) as training:
        stage.wait_held(training, ranks=2)
        victim = training.rank(1)
        limit = victim.memory_info().vms + (64 << 20)
        victim.rlimit(psutil.RLIMIT_AS, (limit, limit))
        stage.release()
        code, _, err = training.end()
    assert code == OutOfMemory.exit_code
    told = only_line(err)
    assert "rank 1 of 2 ran out of memory on cpu (it asked for 4,096 MiB more)" in told
    code, _, err = stage.go_on(*TWO, "-q")
    assert (code, err) == (0, "")
    assert stage.starts() == [0, 10]
    stage.note("told", told)
    stage.equals(whole_of_two)


@pytest.mark.faults(row="M2", fault="the kernel kills a worker for its memory (cgroup)")
def test_a_worker_that_the_kernel_kills_for_its_memory(stage: Stage, whole_of_two: Stage) -> None:
    with (
        cgroup("memory", stage) as group,
        stage.start(*TWO, hold=12, WITNESS_WANTS=str(64 << 20)) as training,
    ):
        stage.wait_held(training, ranks=2)
        (group / "memory.limit_in_bytes").write_text(str(16 << 20))
        (group / "cgroup.procs").write_text(str(training.rank(1).pid))
        since = time.monotonic()
        stage.release()
        recovery = stage.until_training(training, since)
        code, out, err = training.end()
    assert code == 0
    assert "rank 1 of 2 was killed by SIGKILL (often the kernel, out of memory" in only_line(err)
    assert stage.starts() == [0, 10]
    recovered(stage, out, recovery)
    stage.note("told", only_line(err))
    stage.equals(whole_of_two)
