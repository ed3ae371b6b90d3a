"""The wall time of a job runs out, and it is Slurm that says so: nobody sends a signal here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.stage import INSIDE
from tests.real_slurm.cluster import until
from tests.real_slurm.work import ONE, TWO, Note, Work
from tests.run_commands import ROOT, last_step

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1200)]

HOLD = 300
"""The step before which training waits until time is up, however fast the machine is."""


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            ONE,
            marks=pytest.mark.faults(row="F6l", fault="a limit of 2 minutes ends: 1 node, 2 ranks", ray=""),
        ),
        pytest.param(
            TWO,
            marks=pytest.mark.faults(
                row="F6s", fault="a limit of 2 minutes ends: 2 nodes under srun", ray=""
            ),
        ),
    ],
    ids=["1_node", "2_nodes_under_srun"],
)
def test_a_job_whose_time_is_up_saves_and_hands_itself_in_again(
    work: Work, whole: Callable[[int], Path], options: tuple[str, ...], record_property: Note
) -> None:
    slurm, witness = work.slurm, work.folder / "witness"
    witness.mkdir()
    job = work.submit(
        *options,
        *("--time=00:02:00", "--signal=B:USR1@30"),
        settings=("model.kind=witness",),
        PYTHONPATH=f"{INSIDE}{os.pathsep}{ROOT}",
        WITNESS=str(witness),
        WITNESS_HOLD=str(HOLD),
    )
    slurm.wait(job, "RUNNING")
    began = time.monotonic()
    until("training waits", lambda: len([*witness.glob("holding-*")]) == 2, 80)
    assert slurm.show(job)["TimeLimit"] == "00:02:00"
    until("Slurm warns", lambda: "asked to stop" in slurm.output(job), 120)
    warned = time.monotonic() - began
    for gate in witness.glob("holding-*"):
        gate.unlink()
    until("it has handed itself in again", lambda: slurm.state(job) == "PENDING", 60)
    stopped_at = last_step(work.run)
    assert HOLD <= stopped_at < 2 * HOLD
    assert slurm.restarts(job) == 1
    assert "requeued: Slurm starts job" in slurm.output(job)
    assert work.goes_on(job, whole(2), record_property) == 0
    assert f"resumed after step {stopped_at} " in slurm.output(job)
    record_property(
        "told", f"warned after {warned:.0f} s of 120, saved step {stopped_at}, 0 steps done again"
    )
