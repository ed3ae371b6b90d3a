"""Ray Tune: trials that are ordinary runs, a killed trial, a killed driver, several workers, a stop, halving."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.run_commands import ROOT, last_step
from tests.spaces import MODEL, TRAIN, small_space, write_space
from vaedist.core.errors import EXIT_STOPPED, UserError
from vaedist.data.format.index import Index
from vaedist.distributed.process_group import Group
from vaedist.launchers.ray.tuner import TuneOptions, parallel_trials, run
from vaedist.runs.fit_options import FitOptions
from vaedist.training.loop import fit
from vaedist.tuning.controller import SearchController
from vaedist.tuning.measure import measure
from vaedist.tuning.space import Space
from vaedist.tuning.trial_log import Record, Trial

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    # ray.data, which ray.train loads, sets options of its own that it calls deprecated.
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning"),
]

LONG: dict[str, Any] = {"steps": 400, "validate_every": 100, "log_every": 4, "save_every": 4}


@pytest.fixture(scope="module")
def index(phantom: Path) -> Index:
    return Index.open(phantom)


def search(folder: Path, space: Space, index: Index, **options: Any) -> tuple[SearchController, list[str]]:
    """On the Ray of this session, two trials at a time."""
    folder.mkdir(exist_ok=True)
    lines: list[str] = []
    chosen = TuneOptions(**{"device": "cpu", "max_parallel": 2, **options})
    before = random.getstate()
    try:
        return run(space, folder, index, chosen, echo=lines.append), lines
    finally:
        random.setstate(before)  # Tune's event loop shuffles what it waits for with the global generator


def read(folder: Path) -> list[Trial]:
    record = Record.read(folder)
    return [] if record is None else record.trials


def direct(space: Space, trial: Trial, index: Index, place: Path) -> dict[str, float]:
    """The numbers of the same job, trained in this process."""
    job = space.job(trial.settings, str(index.folder), "direct")
    group = Group.join("cpu")
    try:
        fit(job, place, group=group, options=FitOptions(quiet=True))
    finally:
        group.close()
    return measure(place, space)


class Later(threading.Thread):
    """Does something once a run has reached a step."""

    def __init__(self, run: Path, step: int, act: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._run, self._step, self._act = run, step, act
        self.acted = False
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + 300
        while last_step(self._run) < self._step:
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
        self._act()
        self.acted = True


def kill_owner(run: Path) -> None:
    """kill -9 the process that holds a run's lock."""
    os.kill(json.loads((run / "lock").read_bytes())["pid"], signal.SIGKILL)


@pytest.mark.usefixtures("ray_cluster")
def test_trials_have_the_numbers_of_direct_runs(index: Index, tmp_path: Path) -> None:
    space = small_space()
    sweep, lines = search(tmp_path / "search", space, index)
    assert sweep.complete
    assert lines[0] == "Ray found: 2 trials at a time, 1 worker each, CPU"
    trials = read(tmp_path / "search")
    assert [trial.status for trial in trials] == ["finished"] * 3
    assert direct(space, trials[1], index, tmp_path / "direct") == trials[1].measures
    assert not (tmp_path / "search" / ".ray").exists()
    assert not (tmp_path / "search" / "lock").exists()
    again, lines = search(tmp_path / "search", space, index)
    assert again.complete and lines == [], "nothing is left to do, and Ray is not asked"


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_trial_goes_on_from_its_checkpoint(index: Index, tmp_path: Path) -> None:
    space = small_space(train=LONG, trials=2)
    place = tmp_path / "search" / "trials" / "001"
    kill = Later(place, 40, lambda: kill_owner(place))
    sweep, lines = search(tmp_path / "search", space, index)
    assert kill.acted and sweep.complete
    assert lines.count("trial 1: its process died; it goes on from its last checkpoint") == 1
    starts = [start["start_step"] for start in json.loads((place / "provenance.json").read_text())]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] > 0
    trial = read(tmp_path / "search")[1]
    assert direct(space, trial, index, tmp_path / "direct") == trial.measures


@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_of_two_workers_is_a_ray_train_job(index: Index, tmp_path: Path) -> None:
    space = small_space(trials=1)
    sweep, lines = search(tmp_path / "search", space, index, workers=2, max_parallel=1)
    assert sweep.complete
    assert lines[0] == "Ray found: 1 trial at a time, 2 workers each, CPU"
    trial = read(tmp_path / "search")[0]
    starts = json.loads((tmp_path / "search" / "trials" / "000" / "provenance.json").read_text())
    assert [(start["workers"], start["engine"]) for start in starts] == [(2, "ray")]
    alone = direct(space, trial, index, tmp_path / "direct")
    assert trial.measures == pytest.approx(alone, rel=1e-4)


@pytest.mark.usefixtures("ray_cluster")
def test_a_stopped_search_saves_its_trials_and_goes_on(index: Index, tmp_path: Path) -> None:
    space = small_space(train=LONG | {"steps": 4000}, trials=2)
    place = tmp_path / "search" / "trials" / "001"
    stop = Later(place, 40, lambda: os.kill(os.getpid(), signal.SIGTERM))
    sweep, _ = search(tmp_path / "search", space, index)
    assert stop.acted and not sweep.complete
    assert [trial.ended for trial in read(tmp_path / "search")] == [False, False]
    stopped_at = last_step(place)
    assert 40 <= stopped_at < 4000
    assert list((place / "checkpoints").iterdir())
    assert not (place / "lock").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_that_is_behind_at_a_rung_is_stopped(index: Index, tmp_path: Path) -> None:
    space = small_space(
        base={"seed": 3, "model": MODEL, "train": TRAIN | {"steps": 6000, "validate_every": 100}},
        scheduler={"kind": "asha", "metric": "mse", "reduction": 2, "first": 100},
        search={"kind": "grid"},
        dimensions={"train.optim.main.learning_rate": {"kind": "choice", "values": [3e-3, 1e-7]}},
        trials=2,
    )
    # One after the other: of two at a time the worse may be the first at every rung, with nobody to be behind.
    sweep, lines = search(tmp_path / "search", space, index, max_parallel=1)
    better, worse = read(tmp_path / "search")
    assert better.status == "finished"
    assert worse.status == "stopped early" and worse.halted is not None and worse.step < 6000
    assert worse.rungs and worse.measures["mse"] > better.measures["mse"]
    assert sweep.best() is sweep.record.trials[0]
    assert any(line.startswith("trial 1 is behind at step") for line in lines)


@pytest.mark.usefixtures("ray_cluster")
def test_more_than_the_cluster_holds_is_refused(index: Index, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="9 workers need 9 CPUs, but Ray has 4 here"):
        search(tmp_path / "search", small_space(), index, workers=9)
    with pytest.raises(
        UserError, match=r"--max-parallel 3: 3 trials at a time have 6 workers, .* at most 2 trials"
    ):
        search(tmp_path / "search", small_space(), index, workers=2, max_parallel=3)
    assert all(not trial.ended for trial in read(tmp_path / "search"))


@pytest.mark.parametrize(
    ("room", "workers", "wanted", "slots"), [(4, 1, None, 4), (5, 2, None, 2), (5, 2, 1, 1), (4, 4, None, 1)]
)
def test_as_many_trials_as_fit_with_all_their_workers(
    room: int, workers: int, wanted: int | None, slots: int
) -> None:
    assert parallel_trials(room, workers, wanted) == slots


# The driver killed (F20) ------------------------------------------------------------------------------------


class Tuning:
    """`vaedist-tune` in a process of its own, with a private Ray; leaves no process behind."""

    def __init__(
        self, space: Path, folder: Path, data: Path, *more: str, environment: dict[str, str] | None = None
    ) -> None:
        arguments = ["--space", str(space), "--run-dir", str(folder), "--data", str(data), *more]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vaedist.tune", *arguments, "--concurrent", "1", "--device", "cpu"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.family: set[psutil.Process] = set()

    def __enter__(self) -> Tuning:
        return self

    def __exit__(self, *_: object) -> None:
        self.look()
        for one in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.kill()
        self.process.communicate()

    def look(self) -> None:
        """Remember what has been started."""
        if self.process.poll() is None:
            self.family |= set(psutil.Process(self.process.pid).children(recursive=True))

    def wait_until(self, reached: Callable[[], bool], timeout: float = 300.0) -> None:
        deadline = time.monotonic() + timeout
        while not reached():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "it took too long"
            self.look()
            time.sleep(0.2)

    def end(self, timeout: float = 400.0) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err


@pytest.mark.slow
def test_killed_mid_search_the_same_command_continues(index: Index, tmp_path: Path) -> None:
    """F20: kill -9 the driver while a trial trains; then SIGTERM to the next one; the third ends it."""
    space = small_space(train=LONG | {"steps": 2000}, trials=3)
    file, folder = write_space(tmp_path / "space.yaml", space), tmp_path / "search"
    data, cut = Path(index.folder), folder / "trials" / "001"

    def starts() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((cut / "provenance.json").read_text())
        return found

    with Tuning(file, folder, data) as first:
        first.wait_until(lambda: last_step(cut) >= 40)
        first.process.kill()
        code, _, _ = first.end()
        assert code == -signal.SIGKILL
        before = read(folder)
        assert [trial.ended for trial in before] == [True, False]

        # Started at once, as a requeued job is: the killed search's processes may still be going, and their steps are
        # not the second one's.
        with Tuning(file, folder, data) as second:
            second.wait_until(lambda: len(starts()) == 2 and last_step(cut) > starts()[1]["start_step"] + 40)
            second.process.send_signal(signal.SIGTERM)
            code, out, err = second.end()
        assert (code, err) == (EXIT_STOPPED, "")
        assert "trial 1 goes on: " in out
        assert "the same command continues" in out
    with Tuning(file, folder, data) as third:
        code, out, err = third.end()
    assert (code, err) == (0, "")
    after = read(folder)
    assert [trial.status for trial in after] == ["finished"] * 3
    assert after[0] == before[0], "what had ended was not run again"
    assert after[1].settings == before[1].settings
    assert (folder / "trials.jsonl").read_text().count('"event": "trial"') == 3
    assert [start["start_step"] > 0 for start in starts()] == [False, True, True]
    assert direct(space, after[1], index, tmp_path / "direct") == after[1].measures
    assert (folder / "best" / "job.yaml").exists()
    deadline = time.monotonic() + 60
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in first.family):
        assert time.monotonic() < deadline, "the killed search left processes behind"
        time.sleep(0.2)
