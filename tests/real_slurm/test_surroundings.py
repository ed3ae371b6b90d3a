"""What a compute node may be like: a long TMPDIR, a home that takes no file, no way out of the cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.stage import read_only
from tests.real_slurm.work import TWO, Note, Work

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

PROBE = """#!/usr/bin/env bash
# 192.0.2.1 is an address of the outside that nobody has.
touch "$HOME/probe" 2>/dev/null && home="the home takes files" || home="the home takes no file"
ip route get 192.0.2.1 >/dev/null 2>&1 && route="a route out" || route="no route out"
timeout 10 bash -c 'echo >/dev/tcp/192.0.2.1/443' 2>/dev/null && way="a way out" || way="no way out"
timeout 10 getent hosts www.example.org >/dev/null && names="outside names" || names="no outside names"
echo "$SLURMD_NODENAME: TMPDIR of ${#TMPDIR} characters, $home, $route, $way, $names"
"""
"""What a node looks like from inside the job."""


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(
            "srun",
            marks=pytest.mark.faults(
                row="F21s",
                fault="two nodes under srun: a long TMPDIR, a read-only HOME, no network outside",
                ray="",
            ),
        ),
        pytest.param(
            "ray",
            marks=[
                pytest.mark.ray,
                pytest.mark.faults(row="F21r", fault="the same on two nodes under Ray", ray=""),
            ],
        ),
    ],
)
def test_a_job_trains_on_nodes_that_offer_little(
    work: Work, whole: Callable[[int], Path], engine: str, record_property: Note
) -> None:
    expected = whole(2)
    home, temporary = work.folder / "home", work.folder / ("long-" * 30)
    home.mkdir()
    temporary.mkdir()
    probe = work.folder / "probe.sh"
    probe.write_text(PROBE)
    head, _, last = work.script.read_text().rpartition("\nexec ")
    work.script.write_text(f"{head}\nsrun --overlap bash {probe}\nexec {last}")
    with read_only(home):
        job = work.submit(*TWO, engine=engine, HOME=str(home), TMPDIR=str(temporary))
        work.slurm.wait(job, "COMPLETED", seconds=400)
    told = work.slurm.output(job)
    for node in work.slurm.nodes:
        size = len(str(temporary))
        assert size > 108
        assert f"{node}: TMPDIR of {size} characters, the home takes no file, " in told
        (line,) = [line for line in told.splitlines() if line.startswith(f"{node}: TMPDIR")]
        assert line.endswith(", no way out, no outside names")
    work.equals(expected)
    # The empty folder that torch makes for each user, for good.
    left = [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]
    assert left == [], "what was put there is gone"
    record_property("told", f"TMPDIR of {size} characters; trained to the end, with the same weights")
