"""A search whose trial, of one process, stops or stands still: `vaedist-tune` with a private Ray, and a real fault."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.stage import BUSY, Stage
from tests.launchers.ray.test_tuner import LONG, Tuning, direct, read
from tests.run_commands import last_step
from tests.spaces import small_space, write_space
from vaedist.data.format.index import Index
from vaedist.tuning.space import Space

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]
HELD = 30


def space() -> Space:
    """Two trials of a VAE."""
    return small_space(train=LONG | {"steps": 60, "validate_every": 20}, trials=2)


def owner(run: Path) -> int:
    """The process that holds a run's lock."""
    return int(json.loads((run / "lock").read_bytes())["pid"])


class Search(Tuning):
    """A search on a stage; its first trial waits before step 30, the first time that it comes there."""

    def __init__(self, stage: Stage, hang: int) -> None:
        self.folder, self.gate = stage.folder / "search", stage.witness / "holding-0"
        self.first = self.folder / "trials" / "000"
        # `witness` is a VAE, with its numbers, that waits for a test; the processes of a stage alone know it.
        described = write_space(stage.folder / "space.yaml", space())
        described.write_text(described.read_text().replace("kind: vae", "kind: witness"))
        super().__init__(
            described,
            self.folder,
            stage.data,
            "--hang-timeout",
            str(hang),
            environment=stage.environment(hold=HELD),
        )

    def hold(self) -> int:
        """Until the trial waits and its last checkpoint is written; its process."""
        self.wait_until(self.gate.exists, 300 * BUSY)
        due = self.first / "checkpoints" / f"step-{HELD // 4 * 4:09d}"
        self.wait_until(due.exists, 60 * BUSY)
        return owner(self.first)

    def until_training(self, since: float) -> float:
        """Seconds from `since` until the trial has trained a step that it had not."""
        self.wait_until(lambda: last_step(self.first) > HELD, 300 * BUSY)
        return round(time.monotonic() - since, 2)

    def goes_on(self, stage: Stage, told: str) -> None:
        """To its end: one restart, from the checkpoint, with the numbers of a run that nothing happened to."""
        code, out, err = self.end(600 * BUSY)
        assert (code, err) == (0, ""), out
        (line,) = (line for line in out.splitlines() if "it goes on from its last checkpoint" in line)
        assert line.startswith(f"trial 0: {told}")
        record = json.loads((self.first / "provenance.json").read_bytes())
        assert [start["start_step"] for start in record] == [0, HELD // 4 * 4]
        trials = read(self.folder)
        assert [trial.status for trial in trials] == ["finished"] * 2
        expected = direct(space(), trials[0], Index.open(stage.data), stage.folder / "direct")
        assert trials[0].measures == expected
        stage.note("told", line)


@pytest.mark.faults(
    row="F20b", fault="SIGSTOP of a trial's process, of a search under Ray Tune", ray="is not found"
)
def test_a_stopped_trial_is_found(stage: Stage) -> None:
    with Search(stage, hang=10) as tuning:
        stopped = tuning.hold()
        since = time.monotonic()
        os.kill(stopped, signal.SIGSTOP)
        stage.release()
        stage.note("recovery", tuning.until_training(since))
        tuning.goes_on(stage, "its process gave no sign of life for 10 s and was killed; ")


@pytest.mark.faults(
    row="F20c",
    fault="the training thread of a trial loops for ever; its process answers Ray",
    ray="is not found",
)
def test_a_trial_that_stands_still_is_found(stage: Stage) -> None:
    with Search(stage, hang=5) as tuning:
        tuning.hold()
        stage.note("recovery", tuning.until_training(time.monotonic()))
        tuning.goes_on(stage, "its process stood still for 2")
        assert "in _hold" in (tuning.first / "stuck.txt").read_text()
        stage.release()
