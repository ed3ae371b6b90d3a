"""The run folder is rank 0's alone: a checkpoint that the other ranks cannot see resumes all of them."""

from __future__ import annotations

from pathlib import Path

from tests.ranks import run_ranks
from tests.run_commands import curve, small_job

TRAIN = """
import sys
from pathlib import Path
from vaedist.config.job import Job
from vaedist.runs.fit_options import FitOptions
from vaedist.distributed.process_group import Group
from vaedist.training.loop import fit
group = Group.join("cpu", 60)
folder = Path(sys.argv[2]) if group.leads else Path("/proc/no-such-folder")
outcome = fit(Job.model_validate_json(sys.argv[1]), folder, group=group, options=FitOptions(quiet=True))
print(outcome.status, outcome.step, outcome.metrics["loss"].hex())
group.close()
"""


def test_a_checkpoint_that_only_rank_0_can_see(phantom: Path, tmp_path: Path) -> None:
    settings = {"validate_every": 5, "save_every": 5, "optim": {"main": {"learning_rate": 2e-3}}}
    half, whole = (small_job(phantom, "vqvae", steps=steps, **settings) for steps in (5, 10))
    first = run_ranks(TRAIN, 2, half.model_dump_json(), str(tmp_path / "run"))
    second = run_ranks(TRAIN, 2, whole.model_dump_json(), str(tmp_path / "run"))
    straight = run_ranks(TRAIN, 2, whole.model_dump_json(), str(tmp_path / "straight"))
    assert first[0] == first[1] and first[0].startswith("finished 5 ")
    assert second[0] == second[1] == straight[0] and second[0].startswith("finished 10 ")
    assert curve(tmp_path / "run") == curve(tmp_path / "straight")
