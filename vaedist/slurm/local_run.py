"""`vaedist-launch --local`: the stages of a launch without Slurm, one task after the other, through submitit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import submitit

from vaedist.core.errors import EXIT_FINISHED, EXIT_STOPPED, UserError
from vaedist.core.files import replace_file
from vaedist.slurm import launch_record
from vaedist.slurm.batch_job import environment_without
from vaedist.slurm.chain import Stage
from vaedist.slurm.launch_config import LaunchConfig
from vaedist.slurm.submitit_executor import error_lines


def run_locally(stages: Sequence[Stage], config: LaunchConfig, echo: Callable[[str], None]) -> int:
    """Run all stages here. A task is not run where one that it depends on did not finish.

    Returns:
        The exit code: that of the first task that did not finish, else 0.
    """
    codes_by_stage: dict[str, list[int]] = {}
    first_failure = EXIT_FINISHED
    for stage in stages:
        codes = []
        for index, task in enumerate(stage.tasks):
            name = f"{stage.name} {task.label}" if stage.is_array else stage.name
            before = codes_by_stage.get(stage.after, []) if stage.after else []
            needed = before if len(before) != len(stage.tasks) else before[index : index + 1]
            if any(needed):
                echo(f"{name}: not run, because {stage.after} did not finish")
                codes.append(max(needed))
                continue
            code = _run_task(replace(stage, tasks=(task,)), config, name, index, echo)
            first_failure = first_failure or code
            codes.append(code)
            if code == EXIT_STOPPED:
                return code
        codes_by_stage[stage.name] = codes
    return first_failure


def _run_task(stage: Stage, config: LaunchConfig, name: str, index: int, echo: Callable[[str], None]) -> int:
    path = config.folder / f"{stage.name}-{index}.sbatch"
    path.write_text(config.script(stage), encoding="utf-8")
    log = path.with_suffix(".log")
    executor = submitit.LocalExecutor(config.folder / "submitit")
    executor.update_parameters(timeout_min=60 * 24 * 365, stderr_to_stdout=True)
    begun = time.monotonic()
    # Ctrl-C reaches every process of this terminal, and submitit's would kill what it started within a second. So they
    # ignore it; training handles it itself, and to any other command a TERM is sent below.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        job = executor.submit(run_script, str(path), str(log), os.environ.get("CUDA_VISIBLE_DEVICES"))
    finally:
        signal.signal(signal.SIGINT, handler)
    (task,) = config.launched(stage, str(job.job_id), None)
    launch_record.append(config.folder, [replace(task, executor="local", log=str(log))])
    echo(f"{name}: running, log {log}")
    try:
        code = int(job.result())
    except KeyboardInterrupt:
        echo(f"{name}: asked to stop")
        os.kill(int(job.job_id), signal.SIGTERM)
        code = int(job.result())
    except submitit.core.utils.UncompletedJobError as error:
        raise UserError(f"{name} ended without a result: {error_lines(str(error))}; see {log}") from None
    endings = {EXIT_FINISHED: "finished", EXIT_STOPPED: "stopped; the same command goes on"}
    ending = endings.get(code, f"failed with exit code {code}")
    echo(f"{name}: {ending} after {time.monotonic() - begun:.0f} s")
    return code


def run_script(path: str, log: str, devices: str | None) -> int:
    """Run a batch script as Slurm would; its exit code, also in LOG.code. submitit runs this function.

    Args:
        devices: CUDA_VISIBLE_DEVICES as it was: submitit hides all GPUs.
    """
    environment = environment_without("SLURM_", "SBATCH_", "SUBMITIT_", "CUDA_VISIBLE_DEVICES", keep=())
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    with (
        Path(log).open("ab") as file,
        subprocess.Popen(
            ["bash", path], env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        ) as process,
    ):
        # A TERM to submitit's process is meant for the script; Ctrl-C is ignored in both (see `_run_task`).
        signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
        code = process.wait()
    code = code if code >= 0 else 128 - code
    replace_file(Path(f"{log}.code"), f"{code}\n".encode())
    return code
