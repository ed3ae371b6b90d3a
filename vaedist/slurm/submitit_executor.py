"""sbatch through submitit: its executor with a batch script of our own.

submitit's own batch script sends `USR2` to every process of a job step, which kills Ray's, and runs a pickled function.
Ours is a filled-in template (`vaedist.slurm.script`), so there is no pickle that somebody could exchange. What submitit
still does: it submits and keeps the script, and reads the job's number.

submitit has no public way to submit a script. `ScriptExecutor` therefore relies on the private methods that
`PRIVATE_METHODS` lists, and says so where a version of submitit lacks one.

References: submitit 1.5, `submitit.slurm.slurm.SlurmExecutor`; sbatch(1) of Slurm 22.05, "INPUT ENVIRONMENT VARIABLES".
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit

from vaedist.core.errors import UserError
from vaedist.slurm.batch_job import environment_without

PRIVATE_METHODS = (
    "_make_submission_file_text",
    "_make_submission_command",
    "_internal_process_submissions",
    "_submit_command",
)
"""Of `submitit.SlurmExecutor`: the first three are overridden, the last one is called."""

_KEPT_VARIABLES = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT"})


class ScriptExecutor(submitit.SlurmExecutor):
    """submitit's executor for one batch script.

    Args:
        folder: Where submitit keeps the script.
        text: The batch script.
        options: More options of sbatch, such as those that name what the job waits for.

    Raises:
        UserError: this submitit lacks a private method that the class relies on.
    """

    def __init__(self, folder: Path, text: str, options: Sequence[str] = ()) -> None:
        missing = [name for name in PRIVATE_METHODS if not hasattr(submitit.SlurmExecutor, name)]
        if missing:
            raise UserError(
                f"submitit {submitit.__version__} has no SlurmExecutor.{missing[0]} any more, which vaedist submits "
                "scripts with: install submitit 1.5 (pip install 'submitit<1.6'), or submit what --dry-run prints"
            )
        super().__init__(folder)
        self._text, self._options = text, tuple(options)

    @classmethod
    def affinity(cls) -> int:
        return -1 if shutil.which("sbatch") is None else 2

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._text

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return [*sbatch_command(), *self._options, str(submission_file_path)]

    def _internal_process_submissions(self, delayed_submissions: Any) -> list[Any]:
        raise TypeError("this executor submits the script that it was made with: call submit_script()")

    def submit_script(self) -> str:
        """The number of the new job.

        Raises:
            UserError: sbatch refused it, in its own words.
        """
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats there what the error says
                return str(self._submit_command("").job_id)
        except submitit.core.utils.FailedJobError as error:
            raise UserError(f"sbatch refused a job: {error_lines(str(error))}") from None


def sbatch_command() -> list[str]:
    """`sbatch` without the variables that it would take for options, so that it gets what `--dry-run` prints.

    These are `SBATCH_*`, left by `--print-env` for another site, and `SLURM_*`, which inside an allocation describe
    another job.
    """
    kept = environment_without("SBATCH_", "SLURM_", "VAEDIST_SETUP", "VAEDIST_SITE", keep=_KEPT_VARIABLES)
    unset = sorted(os.environ.keys() - kept.keys())
    return ["env", *(word for name in unset for word in ("-u", name)), "sbatch"] if unset else ["sbatch"]


def check_script(stage: str, path: Path) -> None:
    """Have sbatch check a script: a job that waits for another is taken unchecked, and would never start.

    Raises:
        UserError: sbatch refused it, in its own words.
    """
    done = subprocess.run(
        [*sbatch_command(), "--test-only", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise UserError(f"sbatch refused {stage}: {error_lines(done.stderr)}")


def error_lines(text: str) -> str:
    """What a command of Slurm's or submitit's complains about, in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line or line.startswith("sbatch:")] or lines[-1:]
    return "; ".join(dict.fromkeys(line.removeprefix("sbatch: ").removeprefix("error: ") for line in errors))
