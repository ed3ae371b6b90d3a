"""A search over the nodes of a job: its trials use all nodes, and a preemption costs no trial that had ended."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.stage import difference, state
from tests.real_slurm.cluster import ENDED, until
from tests.real_slurm.work import FOREIGN_ENV, Work
from tests.run_commands import ROOT, curve, last_step, train
from tests.spaces import small_space, write_space
from vaedist.tuning.trial_log import Record, Trial, run_folder

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]

Note = Callable[[str, object], None]
STEPS, SAVE, TRIALS = 1500, 100, 6


class Search:
    """A search by `batch.py tune` in a job of two nodes, each with room for one of its trials."""

    def __init__(self, work: Work, data: Path) -> None:
        self.slurm, self.folder = work.slurm, work.folder / "search"
        length = {"steps": STEPS, "log_every": 1, "validate_every": 500, "save_every": SAVE}
        space = small_space(data, train=length, trials=TRIALS, resources={"cpus": 2})
        write_space(work.folder / "space.yaml", space)
        self.job = work.slurm.sbatch(
            *("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--partition=low"),
            f"--output={work.folder}/%j.out",
            work.script,
            *("tune", "--space", "space.yaml", "--run-dir", "search", "--device", "cpu"),
            environment={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **FOREIGN_ENV},
            cwd=work.folder,
        )

    def trials(self) -> list[Trial]:
        record = Record.read(self.folder)
        return [] if record is None else record.trials

    def step(self, trial: Trial) -> int:
        return last_step(run_folder(self.folder, trial.number))

    def starts(self, trial: Trial) -> list[dict[str, Any]]:
        content = (run_folder(self.folder, trial.number) / "provenance.json").read_text()
        return list(json.loads(content))

    def wait_until(self, what: str, there: Callable[[], bool]) -> None:
        def reached() -> bool:
            assert self.slurm.state(self.job) not in ENDED, self.slurm.output(self.job)
            return there()

        until(what, reached, 300)


def some_have_ended_and_others_are_halfway(search: Search) -> bool:
    trials = search.trials()
    under_way = [search.step(trial) for trial in trials if not trial.ended]
    return any(trial.ended for trial in trials) and any(SAVE < step < STEPS // 2 for step in under_way)


@pytest.mark.faults(row="F20s", fault="a search over two nodes is preempted without grace", ray="")
def test_a_preempted_search_goes_on(work: Work, phantom: Path, tmp_path: Path, record_property: Note) -> None:
    search, slurm = Search(work, phantom), work.slurm
    search.wait_until("mid-search", lambda: some_have_ended_and_others_are_halfway(search))
    slurm.preempt(search.job)
    before = search.trials()
    reached = {trial.number: search.step(trial) for trial in before}
    # One that was trained to its end, but not measured, is only measured after the requeue.
    unfinished = [trial.number for trial in before if not trial.ended and reached[trial.number] < STEPS]
    assert unfinished and any(trial.ended for trial in before)
    slurm.release(search.job)
    slurm.wait(search.job, "RUNNING")
    since = time.monotonic()
    again = lambda: any(len(search.starts(before[number])) > 1 for number in unfinished)  # noqa: E731
    search.wait_until("a trial goes on", again)
    record_property("recovery", round(time.monotonic() - since, 1))
    slurm.wait(search.job, "COMPLETED", seconds=400)

    told = slurm.output(search.job)
    assert len(re.findall(r"Ray on 2 nodes of this job: 2 trials at a time", told)) == 2
    trials = search.trials()
    assert [trial.status for trial in trials] == ["finished"] * TRIALS
    assert {start["host"] for trial in trials for start in search.starts(trial)} == set(slurm.nodes)
    # What had ended was not run again, and what had not goes on from its last checkpoint.
    redone = {}
    for trial in trials:
        starts = [start["start_step"] for start in search.starts(trial)]
        if trial.number in unfinished:
            assert trial.settings == before[trial.number].settings
            redone[trial.number] = reached[trial.number] - starts[-1]
            assert 0 <= redone[trial.number] <= SAVE
        else:
            assert starts == [0]
    for trial in before:
        assert not trial.ended or trials[trial.number] == trial
    # The record is whole: every line is an event, and each trial was proposed and has ended once.
    lines = [json.loads(line) for line in (search.folder / "trials.jsonl").read_text().splitlines()]
    for event, count in (("search", 1), ("trial", TRIALS), ("end", TRIALS)):
        assert [line["event"] for line in lines].count(event) == count
    assert (search.folder / "best" / "job.yaml").exists()
    # A trial that was interrupted has the weights of the same job, trained without any of this.
    place = run_folder(search.folder, unfinished[0])
    code, _, err = train(place / "job.yaml", tmp_path / "direct", "--device=cpu")
    assert (code, err) == (0, "")
    assert curve(place) == curve(tmp_path / "direct")
    assert difference(state(place, STEPS), state(tmp_path / "direct", STEPS)) == []
    record_property(
        "told",
        f"{len(unfinished)} of {len(before)} trials go on, {max(redone.values())} steps done again at most",
    )
