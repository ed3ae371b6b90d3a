"""Submission of a launch: its folder, and its stages to Slurm or, one task after the other, to this machine."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from vaedist.core.errors import EXIT_FINISHED, UserError
from vaedist.slurm import launch_record
from vaedist.slurm.chain import Stage
from vaedist.slurm.launch_config import LaunchConfig
from vaedist.slurm.launch_record import LaunchedTask
from vaedist.slurm.submitit_executor import ScriptExecutor, check_script


def launch(
    stages: Sequence[Stage],
    config: LaunchConfig,
    site_file: Path,
    copies: Mapping[str, Path],
    *,
    local: bool,
    echo: Callable[[str], None],
) -> int:
    """Make the launch folder, and submit the stages or run them here; the exit code.

    Args:
        site_file: Copied into the folder, as each job file of `copies` is, to its path there.

    Raises:
        UserError: something was refused; where nothing came into the queue, the folder is removed again.
    """
    from vaedist.slurm.local_run import run_locally

    for stage in stages:
        config.script(stage)  # refuses what sbatch would not take, before anything is made
    try:
        launch_record.create_folder(config.folder, config.site.group)
        launch_record.copy_inputs(config.folder, site_file, copies)
        if local:
            return run_locally(stages, config, echo)
        submit_stages(stages, config, echo)
    except UserError:
        launch_record.discard_folder(config.folder)
        raise
    return EXIT_FINISHED


def submit_stages(
    stages: Sequence[Stage], config: LaunchConfig, echo: Callable[[str], None]
) -> list[LaunchedTask]:
    """Submit all stages; those that are already in the queue are cancelled where a later one is refused.

    Raises:
        UserError: there is no Slurm here, or sbatch refused a stage.
    """
    if ScriptExecutor.affinity() < 0:
        raise UserError("there is no sbatch here: run this on a login node, or add --local")
    scripts = {stage.name: config.script(stage) for stage in stages}  # all, before anything is in the queue
    for stage in stages:
        path = config.folder / f"{stage.name}.sbatch"
        path.write_text(scripts[stage.name], encoding="utf-8")
        check_script(stage.name, path)
    numbers: dict[str, str] = {}
    launched: list[LaunchedTask] = []
    for stage in stages:
        before = numbers.get(stage.after) if stage.after else None
        waiting = dependency_options(before, task_by_task=_after_array(stage, stages))
        try:
            number = ScriptExecutor(config.folder, scripts[stage.name], waiting).submit_script()
        except UserError:
            if numbers:
                subprocess.run(["scancel", *numbers.values()], capture_output=True, check=False)
            raise
        numbers[stage.name] = number
        tasks = config.launched(stage, number, before)
        launch_record.append(config.folder, tasks)
        launched += tasks
        note = f", waits for {stage.after} ({before})" if before else ""
        array = f"_[0-{len(stage.tasks) - 1}]" if stage.is_array else ""
        echo(f"{stage.name}: job {number}{array}{note}")
    return launched


def scripts_to_submit(
    stages: Sequence[Stage], config: LaunchConfig
) -> Iterator[tuple[Stage, str, list[str]]]:
    """Each stage with its script and its dependency options, in which numbers are names in angle brackets."""
    for stage in stages:
        before = f"<{stage.after}>" if stage.after else None
        options = dependency_options(before, task_by_task=_after_array(stage, stages))
        yield stage, config.script(stage), options


def dependency_options(number: str | None, *, task_by_task: bool) -> list[str]:
    """Options of sbatch that make a job wait for another's success, and end with its failure.

    Args:
        task_by_task: Both are arrays of one length, and each task waits for its own.
    """
    if number is None:
        return []
    kind = "aftercorr" if task_by_task else "afterok"
    return [f"--dependency={kind}:{number}", "--kill-on-invalid-dep=yes"]


def _after_array(stage: Stage, stages: Sequence[Stage]) -> bool:
    return any(before.name == stage.after and before.is_array for before in stages)
