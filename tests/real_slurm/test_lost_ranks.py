"""A rank that is lost under srun: Slurm is not asked, all ranks start again in the same allocation."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.stage import INSIDE
from tests.real_slurm.cluster import until
from tests.real_slurm.work import SAVE, TWO, Note, Work
from tests.run_commands import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

ROWS = {
    # row: what happens to rank 1, and what is told of it
    "F1s": ("KILL", "task 1: Killed"),
    "F3s": (
        "STOP",
        r"rank 1 of 2 did not answer for 4[5-7] s \(stopped, frozen, or its machine hung\): killed",
    ),
    "F3t": ("", r"rank 1 of 2 stood still for \d+ s in vaedist\.models\.witness, .* and was ended"),
}
FAULTS = {
    "F1s": "kill -9 of a rank under srun, on the other node",
    "F3s": "SIGSTOP of a rank under srun, on the other node",
    "F3t": "the main thread of a rank under srun stands still, on the other node",
}


def rank_on(work: Work, node: str) -> str:
    """Process id of the one rank on a node, in that node's numbers."""
    listed = work.slurm.on(node, "ps", "-e", "-o", "pid=", "-o", "args=").splitlines()
    (line,) = [line for line in listed if re.match(r"\s*\d+ \S*python\S* -m vaedist\.train ", line)]
    return line.split()[0]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=pytest.mark.faults(row=row, fault=fault, ray=""))
        for row, fault in FAULTS.items()
    ],
)
def test_a_lost_rank_costs_no_more_than_a_checkpoint_interval(
    work: Work, whole: Callable[[int], Path], row: str, record_property: Note
) -> None:
    signal, told = ROWS[row]
    slurm, expected, witness = work.slurm, whole(2), work.folder / "witness"
    witness.mkdir()
    job = work.submit(
        *TWO,
        engine="srun",
        settings=("model.kind=witness",),
        PYTHONPATH=f"{INSIDE}{os.pathsep}{ROOT}",
        WITNESS=str(witness),
        WITNESS_HOLD=str(SAVE + 10),
    )
    until("all ranks wait", lambda: len([*witness.glob("holding-*")]) == 2, 240)
    if signal:
        slurm.on("n2", "kill", f"-{signal}", rank_on(work, "n2"))
        (witness / "holding-1").unlink()
    (witness / "holding-0").unlink()
    since = time.monotonic()
    until("the loss is seen", lambda: "a rank was lost; starting again" in slurm.output(job), 180)
    seen = time.monotonic() - since
    until("training again", lambda: "start   resumed" in slurm.output(job), 120)
    record_property("recovery", round(time.monotonic() - since, 1))
    record_property("parts", f"detection {seen:.1f} s")
    slurm.wait(job, "COMPLETED", seconds=300)
    assert re.search(told, slurm.output(job)), slurm.output(job)
    assert slurm.restarts(job) == 0
    work.equals(expected)
    redone = work.steps_redone(job)
    assert redone <= SAVE
    record_property("told", f"{redone} steps done again (a checkpoint every {SAVE})")
