"""What is to be run: stages that wait for each other, each with one task or an array of them.

A stage is one call of sbatch. `train` has a task for every job file, every point of the grid and every seed; `prior`,
`evaluate` and `sample` follow with a task for each of these; `shard` comes before all of them. Task N of one stage
needs task N of the one before (`aftercorr`), so a run that fails takes only its own successors with it.

Every mistake that can be found is found here, before anything is in the queue: settings and grids are checked as
`vaedist-train` checks them, options of other commands by their own parsers, and shards must exist or be made by the
chain.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vaedist.cli.command_parsers import parse_options
from vaedist.cli.launch_options import MAX_TASKS
from vaedist.cli.parser import CommandLineError
from vaedist.config.job import Data, Job, load_job
from vaedist.config.settings import expand
from vaedist.core.errors import UserError, did_you_mean

STAGES = ("shard", "train", "prior", "evaluate", "sample")


@dataclass(frozen=True)
class Task:
    """One command of vaedist.

    Attributes:
        label: What tells it from the others of its stage.
        arguments: The command without `vaedist-`, and its arguments.
        run: The run folder that it writes or reads; None: none.
    """

    label: str
    arguments: tuple[str, ...]
    run: Path | None = None


@dataclass(frozen=True)
class Stage:
    """Tasks that are submitted together.

    Attributes:
        name: One of `STAGES`, or `tune`.
        tasks: At least one.
        after: The stage that it waits for, or None.
    """

    name: str
    tasks: tuple[Task, ...]
    after: str | None = None

    @property
    def trains(self) -> bool:
        """Whether it may take several nodes."""
        return self.name in ("train", "prior", "tune")

    @property
    def is_array(self) -> bool:
        return len(self.tasks) > 1

    def with_job_copies(self, copies: Mapping[str, Path]) -> Stage:
        """The same stage, reading copies of its job files."""
        if self.name not in ("train", "prior"):
            return self
        arguments = [task.arguments for task in self.tasks]
        copied = [(command, str(copies[job]), *rest) for command, job, *rest in arguments]
        tasks = [replace(task, arguments=words) for task, words in zip(self.tasks, copied, strict=True)]
        return replace(self, tasks=tuple(tasks))


@dataclass(frozen=True)
class LaunchRequest:
    """What the command line asks for.

    Attributes:
        jobs: Job files.
        settings: `key=value` for all of them.
        runs: Where run folders are made.
        seeds, grid: What is varied; a grid entry is a key and its values.
        chain: Which stages, in the order of `STAGES`.
        extra_arguments: For vaedist-train (for vaedist-tune, where `space` is given).
        shard, evaluate, sample: Arguments of these stages, as one text each.
        prior: Job file of the prior and its settings, as one text.
        space: A search space: the one stage is `tune`.
    """

    jobs: tuple[str, ...]
    settings: tuple[str, ...]
    runs: Path
    seeds: tuple[int, ...] = ()
    grid: tuple[tuple[str, tuple[str, ...]], ...] = ()
    chain: tuple[str, ...] = ("train",)
    extra_arguments: tuple[str, ...] = ()
    shard: str | None = None
    prior: str | None = None
    evaluate: str | None = None
    sample: str | None = None
    space: str | None = None


def plan_stages(request: LaunchRequest) -> list[Stage]:
    """The stages of a request, first ones first.

    Raises:
        UserError: a setting, an option, a combination or a path is wrong.
    """
    _check_options(request)
    if request.space is not None:
        return [_tune(request, request.space)]
    _check_request(request)
    points = list(_grid_points(request))
    if len(points) > MAX_TASKS:
        raise UserError(f"this makes {len(points)} runs, and a job array holds {MAX_TASKS}: give fewer")
    stages: list[Stage] = []
    shards: str | None = None
    if "shard" in request.chain:
        stage, shards = _shard(request, points)
        stages.append(stage)
    tasks = tuple(_train(request, point, shards) for point in points)
    _check_run_folders(tasks)
    if "train" in request.chain:
        stages.append(Stage("train", tasks, stages[-1].name if stages else None))
    if "prior" in request.chain:
        tasks = tuple(_prior(request, task, shards) for task in tasks)
        _check_run_folders(tasks)
        stages.append(Stage("prior", tasks, stages[-1].name if stages else None))
    models = stages[-1].name if stages and stages[-1].trains else None
    for name, given in (("evaluate", request.evaluate), ("sample", request.sample)):
        if name in request.chain:
            stages.append(Stage(name, tuple(_on_run(name, task, given or "") for task in tasks), models))
    return stages


# The stages -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _GridPoint:
    """One run of the grid: its job, checked, and how it is written."""

    path: str
    settings: tuple[str, ...]
    job: Job
    label: str


def _grid_points(request: LaunchRequest) -> Iterator[_GridPoint]:
    axes = [[f"{key}={value}" for value in values] for key, values in request.grid]
    if request.seeds:
        axes.append([f"seed={seed}" for seed in request.seeds])
    for path in request.jobs:
        for varied in itertools.product(*axes):
            settings = (*request.settings, *varied)
            job = load_job(path, settings)
            yield _GridPoint(path, settings, job, "-".join([job.name, *map(_folder_part, varied)]))


def _folder_part(setting: str) -> str:
    """`model.beta=0.5` as a part of a folder's name: `beta-0.5`."""
    key, _, value = setting.partition("=")
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", f"{key.rpartition('.')[2]}-{value}").strip("_")


def _shard(request: LaunchRequest, points: Sequence[_GridPoint]) -> tuple[Stage, str]:
    """The stage that packs, and the folder of its shards."""
    arguments = _split(request.shard or "", "--shard")
    if not arguments:
        raise UserError("--chain with shard needs --shard 'INPUT ...', the arguments of vaedist-shard")
    out = parse_options("shard", arguments).out
    if out is None:
        paths = {str(expand(point.job.data.path, "data.path")) for point in points}
        if len(paths) != 1:
            raise UserError("--shard: the jobs read different data: give --out, for example --out shards/all")
        (out,) = paths
        arguments += ["--out", out]
    return Stage("shard", (Task("shard", ("shard", *arguments)),)), str(out)


def _train(request: LaunchRequest, point: _GridPoint, shards: str | None) -> Task:
    run = request.runs / point.label
    if shards is None:
        shards = _data_folder(point.job, must_exist="train" in request.chain)
    arguments = ("train", point.path, *point.settings, f"data.path={_yaml(shards)}", "--run-dir", str(run))
    return Task(point.label, (*arguments, *request.extra_arguments), run)


def _prior(request: LaunchRequest, tokenizer: Task, shards: str | None) -> Task:
    words = _split(request.prior or "", "--prior")
    if not words:
        raise UserError("--chain with prior needs --prior 'JOB.yaml ...', the job file of the prior")
    path, settings = words[0], [*words[1:], f"model.tokenizer={_yaml(str(tokenizer.run))}"]
    job = load_job(path, settings)
    label = f"{job.name}-of-{tokenizer.label}"
    # A prior's job need not say where the images are: they are those whose codes it learns.
    data = next(word for word in reversed(tokenizer.arguments) if word.startswith("data.path="))
    if shards is None and (job.data.path != Data().path or os.environ.get("VAEDIST_DATA")):
        data = f"data.path={_yaml(_data_folder(job, must_exist=True))}"
    run = request.runs / label
    return Task(label, ("train", path, *settings, data, "--run-dir", str(run)), run)


def _on_run(command: str, model: Task, given: str) -> Task:
    """`evaluate` or `sample` of a trained model."""
    assert model.run is not None, "what trains has a run folder"
    options = _split(given, f"--{command}")
    if command == "sample" and parse_options(command, options).out is None:
        options += ["--out", str(model.run / "samples.png")]
    return Task(model.label, (command, str(model.run), *options), model.run)


def _tune(request: LaunchRequest, space: str) -> Stage:
    needless = {"a job file": request.jobs, "--seeds": request.seeds, "--grid": request.grid}
    for name, value in needless.items():
        if value:
            reason = f"--space names what a search varies, and {name} has no place beside it"
            raise UserError(f"{reason}: leave it out")
    if request.chain != ("train",):
        raise UserError("--space makes one job, the search: leave --chain out")
    name = Path(space).stem
    arguments = ("tune", "--space", space, *request.settings)
    run = request.runs / f"tune_{name}"
    if parse_options("tune", request.extra_arguments).run_dir is not None:
        return Stage("tune", (Task(name, (*arguments, *request.extra_arguments)),))
    task = Task(name, (*arguments, "--run-dir", str(run), *request.extra_arguments), run)
    return Stage("tune", (task,))


# Checks -----------------------------------------------------------------------------------------------------


def _check_options(request: LaunchRequest) -> None:
    """A misspelt option or search space costs nothing here, and hours in a queue."""
    texts = {
        f"--{command}": (command, getattr(request, command)) for command in ("shard", "evaluate", "sample")
    }
    if request.extra_arguments:
        command = "tune" if request.space else "train"
        texts["--"] = (command, shlex.join(request.extra_arguments))
    for option, (command, text) in texts.items():
        if text is None:
            continue
        try:
            parse_options(command, _split(text, option))
        except CommandLineError as error:
            raise UserError(f"{option} {text!r}: vaedist-{command} says: {error}") from None
    if request.space is not None:
        from vaedist.tuning.space import load_space

        load_space(request.space, request.settings)


def _check_request(request: LaunchRequest) -> None:
    if not request.jobs:
        raise UserError(
            "nothing to launch: give a job file, for example jobs/vqvae_oasis.yaml, or --space NAME"
        )
    for name in request.chain:
        if name not in STAGES:
            raise UserError(f"--chain has no stage {name!r}{did_you_mean(name, STAGES)}")
    if list(request.chain) != [name for name in STAGES if name in request.chain]:
        raise UserError(f"--chain goes in this order, each once: {','.join(STAGES)}")
    for name in ("shard", "prior", "evaluate", "sample"):
        if getattr(request, name) is not None and name not in request.chain:
            raise UserError(f"--{name} has no effect without --chain {name},...: add it there")
    for word in request.extra_arguments:
        if word.split("=")[0] in ("--run-dir", "--new-run"):
            raise UserError(f"{word} after -- would put all runs in one folder: use --runs DIR")
    if request.extra_arguments and "train" not in request.chain:
        reason = "arguments after -- are those of vaedist-train, and the chain has no train"
        raise UserError(f"{reason}: leave them out")


def _check_run_folders(tasks: Sequence[Task]) -> None:
    runs = [task.run for task in tasks]
    for number, run in enumerate(runs):
        if run in runs[:number]:
            raise UserError(f"two of these would train in one folder, {run}: give each job a name of its own")


def _data_folder(job: Job, *, must_exist: bool) -> str:
    folder = expand(job.data.path, "data.path")
    if must_exist and not (folder / "index.json").is_file():
        raise UserError(
            f"there are no shards in {folder} (data.path of {job.name}): pack them with vaedist-shard, or let the "
            "chain do it: --chain shard,train --shard 'INPUT'"
        )
    return str(folder)


def _split(text: str, option: str) -> list[str]:
    """The words of an option's text, as a shell reads them."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{option} {text!r}: {error}; write it as you would in a shell") from None


def _yaml(text: str) -> str:
    """A path as YAML reads it back: quoted only where it could be taken for something else."""
    plain = re.fullmatch(r"[A-Za-z/._~$][^:#\[\]{},&*!|>'\"%@`]*", text) and text.lower() not in (
        "null true false yes no on off ~".split()
    )
    return text if plain and text == text.strip() else "'" + text.replace("'", "''") + "'"
