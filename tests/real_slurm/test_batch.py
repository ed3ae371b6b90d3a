"""Jobs on a real Slurm: the same curve on any nodes, every way of being stopped, and nothing left behind.

Each test hands a batch script to sbatch that ends as those of `jobs/` do, in the supervisor.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.real_slurm.cluster import KILL_WAIT, Slurm, until
from tests.real_slurm.work import ONE, SAVE, STEPS, TWO, Note, Work
from tests.run_commands import curve

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

ROUNDS = 10
SAME_SECOND = "ten times two jobs that start on two nodes in the same second"


@pytest.mark.parametrize("engine", ["srun", pytest.param("ray", marks=pytest.mark.ray)])
def test_two_nodes_with_two_ranks_give_the_curve_of_four_local_processes(
    work: Work, whole: Callable[[int], Path], engine: str
) -> None:
    job = work.submit("--nodes=2", "--ntasks-per-node=2", engine=engine)
    work.slurm.wait(job, "COMPLETED", seconds=400)
    told = work.slurm.output(job)
    assert f"train 2 nodes x 2 ranks, engine {engine}" in told
    assert told.count(f" step 1/{STEPS} ") == 1, "only rank 0 talks"
    assert work.run.stat().st_mode & 0o777 == 0o700
    work.equals(whole(4))


def _preempted(slurm: Slurm, job: str) -> None:
    slurm.preempt(job)


def _requeued(slurm: Slurm, job: str) -> None:
    slurm.run("scontrol", "requeue", job)


WAYS = {
    # row: partition, whether the site sends the user's signal, what happens, most steps redone
    "F5a": ("low", False, _preempted, SAVE),
    "F5b": ("lowgrace", False, _preempted, 0),
    "F5c": ("lowgrace", True, _preempted, 0),
    "F24a": ("debug", False, _requeued, SAVE),
}
FAULTS = {
    "F5a": "preempted without grace",
    "F5b": "preempted, 8 s of grace, TERM to the steps alone",
    "F5c": "preempted, 8 s of grace, the site sends USR1",
    "F24a": "scontrol requeue",
}


LAYOUTS = {
    # last letter of the row: in words, sbatch's options, engine
    "l": ("1 node, 2 ranks", ONE, None),
    "s": ("2 nodes under srun", TWO, None),
    "r": ("2 nodes under Ray", TWO, "ray"),
}


def _ways() -> Iterator[object]:
    for row, fault in FAULTS.items():
        for letter, (name, _, _) in LAYOUTS.items():
            marks = [pytest.mark.faults(row=f"{row}{letter}", fault=f"{fault}: {name}", ray="")]
            marks += [pytest.mark.ci] * (row in ("F5c", "F24a") and letter == "s")
            marks += [pytest.mark.ray] * (letter == "r")
            yield pytest.param(row, letter, marks=marks, id=f"{row}-{name.replace(' ', '_')}")


@pytest.mark.parametrize(("row", "layout"), [*_ways()])
def test_a_job_that_is_taken_off_its_nodes_goes_on_as_if_nothing_had_been(
    work: Work, whole: Callable[[int], Path], row: str, layout: str, record_property: Note
) -> None:
    partition, user_signal, happen, most = WAYS[row]
    _, options, engine = LAYOUTS[layout]
    if engine == "ray" and not user_signal:
        most = SAVE  # a TERM ends Ray's processes before they can save
    slurm = work.slurm
    with slurm.user_signal() if user_signal else contextlib.nullcontext():
        job = work.submit(f"--partition={partition}", *options, engine=engine)
        work.wait_for_step(SAVE + 10, job)
        happen(slurm, job)
    assert work.goes_on(job, whole(2), record_property) <= most
    assert slurm.restarts(job) == 1
    assert "restart 1" in slurm.output(job)


@pytest.mark.faults(row="F6", fault="the wall time ends", ray="")
def test_the_end_of_the_wall_time_is_not_the_end(
    work: Work, whole: Callable[[int], Path], record_property: Note
) -> None:
    # Slurm warns up to a minute early and counts in minutes: of a limit of 4, training gets the first one.
    job = work.submit("--nodes=2", "--ntasks-per-node=1", "--time=00:04:00", "--begin=now")
    work.wait_for_step(SAVE + 10, job)
    work.slurm.run(
        "scancel", "--batch", "--signal=USR1", job
    )  # what B:USR1@180 sends, without the wait for it
    work.slurm.release(job)
    work.slurm.wait(job, "COMPLETED", seconds=300)
    work.equals(whole(2))
    assert work.steps_redone(job) == 0
    record_property("told", re.findall(r"vaedist: (requeued.*)", work.slurm.output(job))[0])


@pytest.mark.parametrize("engine", ["srun", pytest.param("ray", marks=pytest.mark.ray)])
def test_scancel_leaves_nothing_and_harms_no_other_job(work: Work, engine: str) -> None:
    slurm = work.slurm
    job = work.submit(*TWO, engine=engine)
    other = slurm.sbatch("--nodelist=n1", "--output=/dev/null", "--wrap=exec sleep 300")
    slurm.wait(other, "RUNNING")
    work.wait_for_step(10, job)
    slurm.run("scancel", job)
    slurm.wait(job, "CANCELLED", seconds=KILL_WAIT + 5)

    def there() -> list[str]:
        found = [one for node in slurm.nodes for one in slurm.left(node)]
        return [one for one in found if not re.search(rf"sleep 300|slurmstepd: \[{other}\.", one)]

    until("nothing is left of the job", lambda: not there(), KILL_WAIT + 5)
    assert slurm.state(other) == "RUNNING"
    assert "requeued" not in slurm.output(job), "a job that its user ended stays ended"


def test_jobs_that_start_in_the_same_second_do_not_meet(work: Work) -> None:
    runs = [work.folder / f"run{number}" for number in (1, 2)]
    jobs = [work.submit(*TWO, engine="srun", run=run) for run in runs]
    for job in jobs:
        work.slurm.wait(job, "COMPLETED", seconds=300)
    assert curve(runs[0]) == curve(runs[1])


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("srun", marks=pytest.mark.faults(row="F8s", fault=f"{SAME_SECOND}: srun", ray="")),
        pytest.param(
            "ray", marks=[pytest.mark.ray, pytest.mark.faults(row="F8r", fault=f"{SAME_SECOND}: Ray", ray="")]
        ),
    ],
)
def test_ten_times_two_jobs_in_the_same_second(work: Work, engine: str, record_property: Note) -> None:
    slurm, together, rounds = work.slurm, 0, 0
    first: list[dict[str, object]] = []
    while together < ROUNDS:
        rounds += 1
        assert rounds <= 2 * ROUNDS, "Slurm hardly ever starts them in the same second"
        runs = [work.folder / f"{rounds}-{number}" for number in (1, 2)]
        jobs = [
            work.submit(*TWO, "--hold", engine=engine, run=run, settings=("train.steps=20",)) for run in runs
        ]
        slurm.run("scontrol", "release", ",".join(jobs))
        for job in jobs:
            slurm.wait(job, "COMPLETED", seconds=300)
        together += len({slurm.show(job)["StartTime"] for job in jobs}) == 1
        for job, run in zip(jobs, runs, strict=True):
            told = slurm.output(job)
            assert not re.search(r"did not start|[Aa]ddress already in use|EADDRINUSE", told), told
            assert "device  2 x cpu" in told, "two ranks and no stranger"
            first = first or curve(run)
            assert curve(run) == first
    record_property(
        "told", f"{2 * rounds} jobs, {together} pairs in the same second: no port error, all curves equal"
    )


@pytest.mark.faults(row="F18", fault="a node of two loses its power", ray="")
def test_a_lost_node_costs_no_more_than_a_checkpoint_interval(
    work: Work, whole: Callable[[int], Path], record_property: Note
) -> None:
    slurm = work.slurm
    job = work.submit(*TWO)
    work.wait_for_step(SAVE + 10, job)
    slurm.tool("kill-node", "n2")
    try:
        until("Slurm has queued the job again", lambda: slurm.state(job) == "PENDING", 120)
    finally:
        slurm.tool("start-node", "n2")
    assert work.goes_on(job, whole(2), record_property) <= SAVE


@pytest.mark.faults(row="F9s", fault="two jobs on one run folder", ray="both run and overwrite each other")
def test_the_second_job_on_a_run_folder_is_refused_by_name(work: Work, record_property: Note) -> None:
    first = work.submit(*TWO)
    work.wait_for_step(5, first)
    second = work.submit(*TWO)
    work.slurm.wait(second, "FAILED", seconds=120)
    told = re.findall(r"error: (.*)", work.slurm.output(second))[0]
    assert f"is being trained by Slurm job {first}" in told
    record_property("told", told)
    work.slurm.wait(first, "COMPLETED", seconds=300)


@pytest.mark.faults(row="F24", fault="five requeues in a row, of which the cap allows four", ray="")
def test_restarts_are_capped_and_the_log_is_kept(
    work: Work, whole: Callable[[int], Path], record_property: Note
) -> None:
    (work.folder / "site.yaml").write_text("max_restarts: 4\n")
    job = work.submit(*TWO, VAEDIST_SITE=str(work.folder / "site.yaml"))
    for number in range(1, 6):
        work.wait_for_step(100 * number, job)
        work.slurm.run("scancel", "--batch", "--signal=USR1", job)
        if number < 5:
            work.slurm.release(job)
    work.slurm.wait(job, "FAILED", seconds=60)
    told = re.findall(r"vaedist: (not submitted again.*)", work.slurm.output(job))[0]
    assert "4 restarts" in told
    record_property("told", told)
    assert work.slurm.output(job).count("vaedist: Slurm job") == 5
    again = work.submit(*TWO)
    work.slurm.wait(again, "COMPLETED", seconds=300)
    work.equals(whole(2))
