"""Another user of the node knocks at every port of a running job: nothing is read, and training goes on as before.

Slurm's own programs listen too (slurmd, srun); they are the site's. Ray's processes listen on all addresses of a node,
whatever they are told, and ask for the token; ranks listen on the node's own address alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.real_slurm.cluster import Slurm
from tests.real_slurm.work import TWO, Work
from tests.run_commands import ROOT, curve, last_step

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

Note = Callable[[str, object], None]


def listening(slurm: Slurm, node: str) -> dict[str, str]:
    """Program by address and port, of everything that listens on a node but Slurm's own."""
    lines = slurm.on(node, "ss", "-Hltnp").splitlines()
    found = {line.split()[3]: re.findall(r'users:\(\("([^"]+)"', line)[0] for line in lines}
    return {
        place: program for place, program in found.items() if program not in ("slurmd", "slurmstepd", "srun")
    }


def knock(work: Work, node: str, gcs: str, places: list[str], note: Note) -> None:
    command = [sys.executable, str(ROOT / "tests/real_slurm/foreign_process.py"), str(work.run), gcs, *places]
    tried = work.slurm.on(
        node,
        "env",
        f"PYTHONPATH={ROOT}",
        "RAY_AUTH_MODE=disabled",
        "TORCH_CPP_LOG_LEVEL=FATAL",
        *command,
        seconds=240,
    )
    assert tried.splitlines() == [f"tried {len(places)}"]
    note("told", f"{len(places)} ports on {node}: no file read, nothing joined, training undisturbed")


@pytest.mark.faults(row="N1", fault="another user tries every port of a job under srun", ray="")
def test_foreign_processes_under_srun(
    work: Work, whole: Callable[[int], Path], record_property: Note
) -> None:
    slurm = work.slurm
    job = work.submit(*TWO)
    work.wait_for_step(10, job)
    for node in slurm.nodes:
        (address,) = re.findall(r"NodeAddr=(\S+)", slurm.run("scontrol", "-o", "show", "node", node))
        places = [*listening(slurm, node)]
        assert places or node != slurm.nodes[0], "rank 0's store listens"
        assert {place.rpartition(":")[0] for place in places} <= {address}
        knock(work, node, "-", [f"rank:{place}" for place in places], record_property)
    slurm.wait(job, "COMPLETED", seconds=400)
    assert curve(work.run) == curve(whole(2))


@pytest.mark.ray
@pytest.mark.faults(row="N2", fault="another user tries every port of a job under Ray", ray="")
def test_foreign_processes_under_ray(work: Work, record_property: Note) -> None:
    slurm = work.slurm
    job = work.submit(*TWO, engine="ray", settings=("train.steps=100000",))
    work.wait_for_step(10, job)
    (folder,) = work.run.glob(".cluster-*")
    for node in slurm.nodes:
        programs = listening(slurm, node)
        ranks = {
            place
            for place, program in programs.items()
            if program.startswith("ray::RayTrain") and "*" not in place
        }
        places = [f"rank:{place}" if place in ranks else place for place in programs]
        knock(work, node, (folder / "head").read_text(), places, record_property)
    work.wait_for_step(last_step(work.run) + 20, job)
