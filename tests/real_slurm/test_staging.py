"""Shards are copied once per node to that node's own disk, and a run reads the same from there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.real_slurm.cluster import Slurm
from tests.run_commands import ROOT, curve, small_job, write_job

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]


def test_each_node_has_its_own_copy_and_the_curve_is_the_same(
    slurm: Slurm, phantom: Path, tmp_path: Path
) -> None:
    write_job(tmp_path / "job.yaml", small_job(phantom, steps=6, validate_every=3))
    script = tmp_path / "batch.sh"
    script.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m vaedist.slurm.supervisor "$@"\n')

    def run(name: str, node_local: str) -> str:
        job = slurm.sbatch(
            "--nodes=2", "--ntasks-per-node=2", f"--output={tmp_path}/%j.out", script,
            "--engine=srun", "train", "job.yaml", "--run-dir", str(tmp_path / name), "--device=cpu",
            environment={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VAEDIST_NODE_LOCAL": node_local},
            cwd=tmp_path,
        )  # fmt: skip
        slurm.wait(job, "COMPLETED", seconds=400)
        return slurm.output(job)

    place = f"{slurm.scratch}/$SLURM_JOB_ID"  # as on sites whose scratch folders come and go with the job
    assert "staging: reading from" in run("near", place)
    for node in slurm.nodes:
        [copies] = {
            line.rpartition("/")[0]
            for line in slurm.on(node, "find", str(slurm.scratch), "-name", "*.tar").splitlines()
        }
        assert "/vaedist-0/" in copies, "one copy for both ranks of the node"
    assert "staging" not in run("far", "")
    assert curve(tmp_path / "near") == curve(tmp_path / "far")
