"""Ray's rows of the matrix, each on a private cluster of its own: killed, killed after a commit, stopped, elastic.

The elastic run shares its cluster with others, who take and give back CPUs: Ray resizes its group as it does when a
node comes or goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from tests.faults.stage import BUSY, SAVE, STEPS, Stage, job, only_line
from tests.run_commands import ROOT, Training, curve

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3000)]
RAY = ("--engine", "ray", "--device", "cpu")
TWO = (*RAY, "--workers", "2")


class Paced:
    """A run whose steps a test lets pass."""

    def __init__(self, stage: Stage) -> None:
        content = job(stage.data)
        content["model"]["kind"] = "paced"
        stage.job.write_text(yaml.safe_dump(content))
        self.stage = stage

    def allow(self, step: int = STEPS) -> None:
        """Let all steps before `step` be taken."""
        scratch = self.stage.witness / ".limit"
        scratch.write_text(str(step))
        scratch.replace(self.stage.witness / "limit")

    def wait(self, training: Training, world: int, step: int) -> list[psutil.Process]:
        """Until `world` ranks wait before `step` and what is due is saved; their processes, by rank."""
        found: list[psutil.Process] = []

        def there() -> bool:
            time.sleep(0.2)
            found.clear()
            with contextlib.suppress(OSError, psutil.Error):
                for rank in range(world):
                    told = json.loads((self.stage.witness / f"waits-{rank}").read_bytes())
                    if (told["step"], told["world"]) == (step, world):
                        found.append(psutil.Process(told["pid"]))
            return len(found) == world

        training.wait_until(there, 300 * BUSY, f"have {world} ranks before step {step}")
        saved = self.stage.run / "checkpoints" / f"step-{step // SAVE * SAVE:09d}"
        training.wait_until(lambda: step < SAVE or saved.exists(), 60 * BUSY, "save")
        self.stage.now()
        return found


@pytest.fixture
def paced(stage: Stage) -> Paced:
    return Paced(stage)


def noted(stage: Stage, out: str, recovery: float, told: str) -> None:
    """Note the recovery and its parts: what the driver told, and the rest, which is detection."""
    found = re.search(r"training again ([\d.]+) s after the loss was noticed: (.*)", out)
    assert found, out
    stage.note("recovery", recovery)
    stage.note("parts", f"detection {max(0.0, recovery - float(found[1])):.1f} s, {found[2]}")
    stage.note("told", told)


@pytest.mark.faults(
    row="F1 Ray",
    fault="kill -9 of a Ray worker at a random step",
    ray="notices after 1.6 s, trains again after 22 to 37 s",
)
def test_a_killed_worker(paced: Paced, whole_of_two: Stage) -> None:
    stage, step = paced.stage, 11 + secrets.randbelow(14)
    paced.allow(step)
    with stage.start(*TWO) as training:
        _, victim = paced.wait(training, 2, step)
        since = time.monotonic()
        victim.kill()
        paced.allow()
        recovery = stage.until_training(training, since)
        code, out, err = training.end(600 * BUSY)
    assert code == 0, err
    told = only_line(err)
    assert "rank 1 of 2 died" in told
    assert "starting again from the last checkpoint (1 of at most 3 times)" in told
    assert stage.starts() == [0, step // SAVE * SAVE], "at most one checkpoint interval is done again"
    noted(stage, out, recovery, told)
    stage.equals(whole_of_two)


@pytest.mark.faults(
    row="F2 Ray",
    fault="kill -9 of rank 0 right after a checkpoint was committed",
    ray="loses a checkpoint reported less than 2 s before the death, for ever",
)
def test_killed_right_after_a_commit(paced: Paced, whole_of_two: Stage) -> None:
    stage = paced.stage
    orders = {"place": "after-rename", "path": "step-000000010", "once": str(stage.folder / "once")}
    paced.allow()
    with stage.start(*TWO, FAULT_KILL=json.dumps(orders)) as training:
        training.wait_until((stage.folder / "once").exists, 300 * BUSY, "be killed")
        stage.now()
        since = time.monotonic()
        recovery = stage.until_training(training, since)
        code, out, err = training.end(600 * BUSY)
    assert code == 0, err
    assert "rank 0 of 2 died" in only_line(err)
    assert stage.starts() == [0, 10], "the checkpoint that Ray never heard of is where it goes on"
    noted(stage, out, recovery, only_line(err))
    stage.equals(whole_of_two)


@pytest.mark.faults(
    row="F3 Ray",
    fault="SIGSTOP of a Ray worker",
    ray="finds it after 600 s; after 77 s in all with its time-out set to 12 s",
)
def test_a_stopped_worker_is_found_within_a_minute(paced: Paced, whole_of_two: Stage) -> None:
    stage = paced.stage
    paced.allow(13)
    with stage.start(*TWO) as training:
        _, stopped = paced.wait(training, 2, 13)
        since = time.monotonic()
        stopped.send_signal(signal.SIGSTOP)
        paced.allow()
        recovery = stage.until_training(training, since)
        assert not stopped.is_running(), "it must not wake up and write"
        code, out, err = training.end(600 * BUSY)
    assert code == 0, err
    assert "rank 1 of 2 gave no sign of life for 45 s and was killed" in only_line(err)
    assert stage.starts() == [0, 10]
    noted(stage, out, recovery, only_line(err))
    stage.equals(whole_of_two)


@pytest.mark.faults(
    row="F3d Ray",
    fault="the training thread of a Ray worker loops for ever; its process answers Ray",
    ray="finds it when the collective of the others gives up, after 30 minutes",
)
def test_a_training_thread_that_loops_is_found(paced: Paced, whole_of_two: Stage) -> None:
    stage = paced.stage
    paced.allow(13)
    with stage.start(*TWO, "--hang-timeout", "15", PACED_STAYS="1") as training:
        _, stuck = paced.wait(training, 2, 13)
        since = time.monotonic()
        paced.allow()
        recovery = stage.until_training(training, since)
        assert not stuck.is_running()
        code, out, err = training.end(600 * BUSY)
    assert code == 0, err
    told = only_line(err)
    assert "rank 1 of 2 stood still for 1" in told and "in vaedist.models.paced, line" in told
    assert "starting again from the last checkpoint (1 of at most 3 times)" in told
    assert "in _hold" in (stage.run / "stuck.txt").read_text()
    assert stage.starts() == [0, 10]
    noted(stage, out, recovery, told)
    stage.equals(whole_of_two)


@pytest.mark.faults(
    row="F3e Ray",
    fault="a Ray worker validates and reads from what never answers; its process answers Ray",
    ray="finds it when the collective of the others gives up, after 30 minutes",
)
def test_a_read_that_never_returns_is_found(stage: Stage, whole_of_two: Stage) -> None:
    """Ray's own threads in the worker are busy with little things all the time: they are no sign of work."""
    os.mkfifo(stage.witness / "pipe")
    with stage.start(*TWO, "--hang-timeout", "5", WITNESS_READS="1") as training:
        training.wait_until((stage.witness / "held-1").exists, 300 * BUSY, "read")
        stage.now()
        since = time.monotonic()
        recovery = stage.until_training(training, since)
        code, out, err = training.end(600 * BUSY)
    assert code == 0, err
    told = only_line(err)
    assert "rank 1 of 2 stood still for 2" in told and "(_validates)" in told
    noted(stage, out, recovery, told)
    stage.equals(whole_of_two)


# Elastic ----------------------------------------------------------------------------------------------------


class On(Training):
    """A run on the cluster that a module beside this one starts for it."""

    def __init__(self, module: str, stage: Stage, *arguments: str) -> None:
        self.run, self._witness = stage.run, stage.witness
        command = [
            sys.executable,
            "-m",
            f"tests.faults.{module}",
            str(stage.job),
            "--run-dir",
            str(stage.run),
        ]
        self.process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **stage.environment()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.family = psutil.Process(self.process.pid)


class Shared(On):
    """On a cluster of three CPUs, of which others have reserved some."""

    def __init__(self, stage: Stage, *arguments: str) -> None:
        self._witness = stage.witness
        self.others(1)
        super().__init__("others", stage, *arguments)

    def others(self, cpus: int) -> None:
        """Let others have so many CPUs."""
        scratch = self._witness / ".others"
        scratch.write_text(str(cpus))
        scratch.replace(self._witness / "others")


@pytest.mark.faults(
    row="F17 Ray",
    fault="elastic run: others take and give back CPUs of its cluster, so that it has 2, 1, 3, 2 workers",
    ray="restarts its group without warning, from the last checkpoint that it knows of",
)
def test_an_elastic_run_follows_its_cluster(paced: Paced, whole: Stage) -> None:
    stage = paced.stage
    paced.allow(8)
    with Shared(stage, *RAY, "--workers", "1:3") as training:
        paced.wait(training, 2, 8)
        since = time.monotonic()
        training.others(2)
        paced.wait(training, 1, 8)
        stage.note("recovery", round(time.monotonic() - since, 2))
        paced.allow(14)
        paced.wait(training, 1, 14)
        training.others(0)
        paced.wait(training, 3, 14)
        paced.allow(21)
        paced.wait(training, 3, 21)
        training.others(1)
        paced.wait(training, 2, 21)
        paced.allow()
        code, out, err = training.end(600 * BUSY)
    assert code == 0, err
    starts = json.loads((stage.run / "provenance.json").read_bytes())
    trained = [(start["workers"], start["start_step"]) for start in starts]
    assert trained == [(2, 0), (1, 5), (3, 10), (2, 20)], "at most one checkpoint interval is done again"
    for before, after in ((2, 1), (1, 3), (3, 2)):
        assert f"vaedist: {before} workers became {after}, for which" in err
    assert err.count("\n") == 3
    assert "1 to 3 (3 now) x CPU" in out
    assert stage.keys() == whole.keys(), "the same samples in the same order at every step"
    ours, theirs = curve(stage.run), curve(whole.run)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
    stage.note("told", err.splitlines()[0])
    stage.note(
        "parts",
        f"workers and the step they began at: {trained}; sample keys equal at all {len(stage.keys())} steps",
    )


@pytest.mark.faults(
    row="F18 Ray",
    fault="elastic run: kill -9 of the raylet of one of two nodes; then another node comes in its place",
    ray="restarts its group without warning, from the last checkpoint that it knows of",
)
def test_an_elastic_run_loses_a_node_and_gets_one_back(paced: Paced, whole: Stage) -> None:
    stage = paced.stage
    paced.allow(8)
    with On("nodes", stage, *RAY, "--workers", "1:2") as training:
        ranks = paced.wait(training, 2, 8)
        raylet = psutil.Process(int((stage.witness / "raylet").read_text()))
        assert sum(raylet in rank.parents() for rank in ranks) == 1, "a worker on each node"
        since = time.monotonic()
        raylet.kill()
        paced.wait(training, 1, 8)
        stage.note("recovery", round(time.monotonic() - since, 2))
        paced.allow(14)
        paced.wait(training, 1, 14)
        (stage.witness / "return").touch()
        ranks = paced.wait(training, 2, 14)
        raylet = psutil.Process(int((stage.witness / "raylet").read_text()))
        assert sum(raylet in rank.parents() for rank in ranks) == 1, "the new node has its worker"
        paced.allow()
        code, _, err = training.end(600 * BUSY)
    assert code == 0, err
    starts = json.loads((stage.run / "provenance.json").read_bytes())
    trained = [(start["workers"], start["start_step"]) for start in starts]
    assert trained == [(2, 0), (1, 5), (2, 10)], "at most one checkpoint interval is done again"
    assert re.search(r"rank [01] of 2 died \(killed, or out of memory\); starting again", err)
    assert "vaedist: 2 workers became 1, for which" in err and "vaedist: 1 workers became 2, for which" in err
    assert stage.keys() == whole.keys(), "the same samples in the same order at every step"
    ours, theirs = curve(stage.run), curve(whole.run)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
    stage.note("told", err.splitlines()[0])
    stage.note(
        "parts",
        f"workers and the step they began at: {trained}; sample keys equal at all {len(stage.keys())} steps",
    )
