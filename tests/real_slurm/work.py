"""A training as a batch job: a folder to submit from, and what its curve must equal."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.stage import difference, state
from tests.real_slurm.cluster import ENDED, Slurm, until
from tests.run_commands import ROOT, curve, last_step, small_job, write_job

STEPS, SAVE = 1000, 200
ONE, TWO = ("--nodes=1", "--ntasks-per-node=2"), ("--nodes=2", "--ntasks-per-node=1")
Note = Callable[[str, object], None]

FOREIGN_ENV = {
    "RAY_ADDRESS": "192.0.2.1:6379",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_TOKEN": "no",
}
"""Every job inherits these from the shell that it is submitted from, and must not care."""


class Work:
    """A folder to submit from, with a job file and a batch script."""

    def __init__(self, slurm: Slurm, folder: Path, data: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.run = folder / "run"
        job = small_job(data, steps=STEPS, save_every=SAVE, validate_every=500)
        write_job(folder / "job.yaml", job)
        self.script = folder / "batch.sh"
        self.script.write_text(
            "#!/usr/bin/env bash\n"
            "#SBATCH --open-mode=append --signal=B:USR1@180 --requeue --time=01:00:00\n"
            f'exec {sys.executable} -m vaedist.slurm.supervisor "$@"\n'
        )

    def submit(
        self,
        *options: str,
        engine: str | None = None,
        run: Path | None = None,
        settings: tuple[str, ...] = (),
        **variables: str,
    ) -> str:
        """Hand in the training; the job's number."""
        chosen = [f"--engine={engine}"] if engine else []
        arguments = ["train", "job.yaml", *settings, "--run-dir", str(run or self.run), "--device=cpu"]
        return self.slurm.sbatch(
            *options,
            f"--output={self.folder}/%j.out",
            self.script,
            *chosen,
            *arguments,
            environment={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **FOREIGN_ENV, **variables},
            cwd=self.folder,
        )

    def wait_for_step(self, step: int, job: str) -> None:
        def there() -> bool:
            assert self.slurm.state(job) not in ENDED, self.slurm.output(job)
            return last_step(self.run) >= step

        until(f"step {step}", there, 240)

    def steps_redone(self, job: str) -> int:
        """Steps that the log tells of more than once."""
        told = re.findall(rf" step (\d+)/{STEPS} ", self.slurm.output(job))
        assert {int(step) for step in told} == set(range(1, STEPS + 1))
        return len(told) - STEPS

    def goes_on(self, job: str, whole: Path, note: Note) -> int:
        """Let a job that was queued again end as if nothing had been; how many steps were done more than once."""
        self.slurm.release(job)
        since = time.monotonic()
        self.slurm.wait(job, "RUNNING", seconds=60)
        last_start = lambda: self.slurm.output(job).rpartition("vaedist: Slurm job")[2]  # noqa: E731
        until("training again", lambda: "from step" in last_start(), 180)
        note("recovery", time.monotonic() - since)
        self.slurm.wait(job, "COMPLETED", seconds=300)
        self.equals(whole)
        redone = self.steps_redone(job)
        note("told", f"{redone} steps done again (a checkpoint every {SAVE})")
        return redone

    def equals(self, whole: Path) -> None:
        assert curve(self.run) == curve(whole)
        assert difference(state(self.run, STEPS), state(whole, STEPS)) == []
