"""Surroundings that a program does not choose: environment variables, home folders, temporary folders, clocks."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults.stage import STEPS, Stage, read_only

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
DAY = 86400


def hostile(stage: Stage) -> dict[str, str]:
    """A long TMPDIR, a home that takes no file, and the address of a Ray that is not ours."""
    home = stage.folder / "home"
    home.mkdir()
    stage.temp = stage.folder / ("long-" * 30) / ("longer-" * 10)
    stage.temp.mkdir(parents=True)
    return {"HOME": str(home), "RAY_ADDRESS": "192.0.2.1:6379", "RAY_NAMESPACE": "foreign"}


@pytest.mark.faults(
    row="F21",
    fault="a TMPDIR of 300 characters, a read-only HOME, a foreign RAY_ADDRESS",
    ray="does not start with a long temporary folder; joins whatever RAY_ADDRESS names",
)
def test_hostile_variables(stage: Stage, whole_of_two: Stage) -> None:
    variables = hostile(stage)
    with read_only(Path(variables["HOME"])):
        code, _, err = stage.go_on("--workers", "2", "-q", **variables)
    assert (code, err) == (0, "")
    stage.note("told", "nothing")
    stage.equals(whole_of_two)


@pytest.mark.ray
@pytest.mark.faults(row="F21b", fault="the same under Ray", ray="as above")
def test_hostile_variables_under_ray(stage: Stage, whole_of_two: Stage) -> None:
    variables = hostile(stage)
    with read_only(Path(variables["HOME"])):
        code, _, err = stage.go_on("--engine", "ray", "--device", "cpu", "--workers", "2", "-q", **variables)
    assert (code, err) == (0, "")
    stage.note("told", "nothing")
    stage.equals(whole_of_two)


@pytest.mark.faults(
    row="M4", fault="the clock jumps back by 3 days between two starts, and by 2 hours in a run"
)
def test_a_clock_that_jumps_back(stage: Stage, whole: Stage, half: Stage) -> None:
    stage.begin_with(half)
    days = {"seconds": -3 * DAY, "path": ""}
    with stage.start("-q", hold=23, FAULT_CLOCK=json.dumps(days)) as training:
        stage.wait_held(training)
        training.signal(signal.SIGKILL)
        training.end()
    stage.release()
    times = [entry["time"] for entry in json.loads((stage.run / "provenance.json").read_bytes())]
    assert times[1] < times[0], "the second attempt began before the first"
    hours = {"seconds": -7200, "path": "step-000000025"}
    assert stage.go_on("-q", FAULT_CLOCK=json.dumps(hours))[::2] == (0, "")
    assert stage.starts() == [0, 15, 20]
    rows = [json.loads(line)["time"] for line in (stage.run / "metrics.jsonl").read_text().splitlines()]
    assert rows != sorted(rows), "the rows tell the time as it was told"
    for purges in (False, True):
        board = EventAccumulator(str(stage.run / "tensorboard"), purge_orphaned_data=purges).Reload()
        assert [event.step for event in board.Scalars("train/loss")] == list(range(1, STEPS + 1))
    stage.note("told", "nothing: steps are ordered by their number, and the lock by its proofs")
    stage.equals(whole)
