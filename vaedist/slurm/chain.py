"""What is to be run: links that wait for each other, each with one task or an array of them.

A link is one call of sbatch. `train` has a task for every job file, every point of the grid and every seed; `prior`,
`evaluate` and `sample` follow with a task for each of these; `shard` comes before all of them. Task N of one link
needs task N of the one before (`aftercorr`), so a run that fails takes only its own successors with it.

Everything a person can get wrong is found here, before anything is in the queue: settings and grids are checked as
`vaedist-train` checks them, and shards must be there or be made by the chain.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vaedist.config.job import Data, Job, load_job
from vaedist.config.settings import expand
from vaedist.core.errors import UserError, did_you_mean

LINKS = ("shard", "train", "prior", "evaluate", "sample")
MOST_TASKS = 1000
"""The longest job array that Slurm takes unless a site allows more (MaxArraySize is 1001)."""


@dataclass(frozen=True)
class Task:
    """One command.

    Attributes:
        label: What tells it from the others of its link.
        arguments: The verb and what it is given.
        run: The run folder that it writes or reads; None: none.
    """

    label: str
    arguments: tuple[str, ...]
    run: Path | None = None


@dataclass(frozen=True)
class Link:
    """Tasks that are handed in together.

    Attributes:
        name: One of `LINKS`, or `tune`.
        tasks: At least one.
        after: The link that it waits for, or None.
    """

    name: str
    tasks: tuple[Task, ...]
    after: str | None = None

    @property
    def trains(self) -> bool:
        """Whether it may take several nodes."""
        return self.name in ("train", "prior", "tune")

    def reading(self, copies: Mapping[str, Path]) -> Link:
        """The same link, reading copies of its job files."""
        tasks = []
        for task in self.tasks:
            verb, first, *rest = task.arguments
            if verb == "train" and first in copies:
                first = str(copies[first])
            tasks.append(replace(task, arguments=(verb, first, *rest)))
        return replace(self, tasks=tuple(tasks))


@dataclass(frozen=True)
class Order:
    """What the command line asks for.

    Attributes:
        jobs: Job files.
        settings: `key=value` for all of them.
        seeds, grid: What is varied; a grid entry is a key and its values.
        chain: Which links, in the order of `LINKS`.
        runs: Where run folders are made.
        further: More arguments of vaedist-train (of vaedist-tune, where `space` is given).
        shard, evaluate, sample: Arguments of these links, as one text each.
        prior: Job file of the prior and its settings, as one text.
        space: A search space: the one link is `tune`.
    """

    jobs: tuple[str, ...]
    settings: tuple[str, ...]
    runs: Path
    seeds: tuple[int, ...] = ()
    grid: tuple[tuple[str, tuple[str, ...]], ...] = ()
    chain: tuple[str, ...] = ("train",)
    further: tuple[str, ...] = ()
    shard: str | None = None
    prior: str | None = None
    evaluate: str | None = None
    sample: str | None = None
    space: str | None = None


def links(order: Order) -> list[Link]:
    """The links of an order, first ones first.

    Raises:
        UserError: a setting, a combination or a path is wrong.
    """
    if order.space is not None:
        return [_tune(order)]
    _check(order)
    points = [_Point(job, settings, label) for job, settings, label in _points(order)]
    if len(points) > MOST_TASKS:
        raise UserError(f"this makes {len(points)} runs, and a job array holds {MOST_TASKS}: give fewer")
    found: list[Link] = []
    out: str | None = None
    if "shard" in order.chain:
        link, out = _shard(order, points)
        found.append(link)
    trained = tuple(_train(order, point, out, made="shard" in order.chain) for point in points)
    _different([task.run for task in trained])
    if "train" in order.chain:
        found.append(Link("train", trained, "shard" if "shard" in order.chain else None))
    last = trained
    if "prior" in order.chain:
        last = tuple(_prior(order, task, out, made="shard" in order.chain) for task in trained)
        _different([task.run for task in last])
        found.append(Link("prior", last, found[-1].name if found else None))
    model = found[-1].name if found and found[-1].trains else None
    for name, given in (("evaluate", order.evaluate), ("sample", order.sample)):
        if name in order.chain:
            tasks = tuple(_after(name, task, given or "") for task in last)
            found.append(Link(name, tasks, model))
    return found


# The links --------------------------------------------------------------------------------------------------


class _Point:
    """One run of the grid: its job, checked, and how it is written."""

    def __init__(self, path: str, settings: tuple[str, ...], label: str) -> None:
        self.path, self.settings = path, settings
        self.job: Job = load_job(path, settings)
        self.label = "-".join(part for part in (self.job.name, label) if part)


def _points(order: Order) -> Iterable[tuple[str, tuple[str, ...], str]]:
    axes = [[f"{key}={value}" for value in values] for key, values in order.grid]
    if order.seeds:
        axes.append([f"seed={seed}" for seed in order.seeds])
    for job in order.jobs:
        for point in itertools.product(*axes):
            yield job, (*order.settings, *point), "-".join(_short(setting) for setting in point)


def _short(setting: str) -> str:
    """`model.beta=0.5` as a part of a folder's name: `beta-0.5`."""
    key, _, value = setting.partition("=")
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", f"{key.rpartition('.')[2]}-{value}").strip("_")


def _shard(order: Order, points: Sequence[_Point]) -> tuple[Link, str]:
    arguments = _words(order.shard or "", "--shard")
    if not arguments:
        raise UserError("--chain with shard needs --shard 'INPUT ...', the arguments of vaedist-shard")
    given = [argument for argument in arguments if argument == "--out" or argument.startswith("--out=")]
    if given == ["--out"] and arguments.index("--out") + 1 < len(arguments):
        out = arguments[arguments.index("--out") + 1]
    elif given:
        out = given[-1].partition("=")[2]
    else:
        paths = {str(expand(point.job.data.path, "data.path")) for point in points}
        if len(paths) != 1:
            raise UserError("--shard: the jobs read different data: give --out, for example --out shards/all")
        out = paths.pop()
        arguments += ["--out", out]
    return Link("shard", (Task("shard", ("shard", *arguments)),)), out


def _train(order: Order, point: _Point, out: str | None, *, made: bool) -> Task:
    run = order.runs / point.label
    data = out if out is not None else _data(point.job, made=made or "train" not in order.chain)
    arguments = ("train", point.path, *point.settings, f"data.path={_yaml(data)}", "--run-dir", str(run))
    return Task(point.label, (*arguments, *order.further), run)


def _prior(order: Order, tokens: Task, out: str | None, *, made: bool) -> Task:
    words = _words(order.prior or "", "--prior")
    if not words:
        raise UserError("--chain with prior needs --prior 'JOB.yaml ...', the job file of the prior")
    path, settings = words[0], words[1:]
    settings = [*settings, f"model.tokenizer={_yaml(str(tokens.run))}"]
    job = load_job(path, settings)
    label = f"{job.name}-of-{tokens.label}"
    # A prior's job need not say where the images are: they are those whose codes it learns.
    data = next(word for word in reversed(tokens.arguments) if word.startswith("data.path="))
    if out is None and (job.data.path != Data().path or os.environ.get("VAEDIST_DATA")):
        data = f"data.path={_yaml(_data(job, made=made))}"
    run = order.runs / label
    return Task(label, ("train", path, *settings, data, "--run-dir", str(run)), run)


def _after(verb: str, model: Task, given: str) -> Task:
    assert model.run is not None, "what trains has a run folder"
    arguments = [verb, str(model.run), *_words(given, f"--{verb}")]
    if verb == "sample" and not any(word.split("=")[0] in ("--output-path", "--out") for word in arguments):
        arguments += ["--out", str(model.run / "samples.png")]
    return Task(model.label, tuple(arguments), model.run)


def _tune(order: Order) -> Link:
    assert order.space is not None
    foreign = {"a job file": order.jobs, "--seeds": order.seeds, "--grid": order.grid}
    for name, value in foreign.items():
        if value:
            raise UserError(
                f"--space names what a search varies, and {name} has no place beside it: leave it out"
            )
    if order.chain != ("train",):
        raise UserError("--space makes one job, the search: leave --chain out")
    run = order.runs / f"tune_{Path(order.space).stem}"
    given = [word.split("=")[0] for word in order.further]
    place = () if "--run-dir" in given else ("--run-dir", str(run))
    arguments = ("tune", "--space", order.space, *order.settings, *place, *order.further)
    return Link("tune", (Task(Path(order.space).stem, arguments, None if "--run-dir" in given else run),))


# Checks -----------------------------------------------------------------------------------------------------


def _check(order: Order) -> None:
    if not order.jobs:
        raise UserError(
            "nothing to launch: give a job file, for example jobs/vqvae_oasis.yaml, or --space NAME"
        )
    for name in order.chain:
        if name not in LINKS:
            raise UserError(f"--chain has no link {name!r}{did_you_mean(name, LINKS)}")
    if list(order.chain) != [name for name in LINKS if name in order.chain]:
        raise UserError(f"--chain goes in this order, each once: {','.join(LINKS)}")
    for name in ("shard", "prior", "evaluate", "sample"):
        if getattr(order, name) is not None and name not in order.chain:
            raise UserError(f"--{name} has no effect without --chain {name},...: add it there")
    for word in order.further:
        if word.split("=")[0] in ("--run-dir", "--new-run"):
            raise UserError(f"{word} after -- would put all runs in one folder: use --runs DIR")
    if order.further and "train" not in order.chain:
        raise UserError(
            "arguments after -- are those of vaedist-train, and the chain has no train: leave them out"
        )


def _different(runs: Sequence[Path | None]) -> None:
    for number, run in enumerate(runs):
        if run in runs[:number]:
            raise UserError(f"two of these would train in one folder, {run}: give each job a name of its own")


def _data(job: Job, *, made: bool) -> str:
    folder = expand(job.data.path, "data.path")
    if not made and not (folder / "index.json").is_file():
        raise UserError(
            f"there are no shards in {folder} (data.path of {job.name}): pack them with vaedist-shard, or let the "
            "chain do it: --chain shard,train --shard 'INPUT'"
        )
    return str(folder)


def _words(text: str, what: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{what} {text!r}: {error}; write it as you would in a shell") from None


def _yaml(text: str) -> str:
    """A path as YAML reads it back: quoted only where it could be taken for something else."""
    plain = re.fullmatch(r"[A-Za-z/._~$][^:#\[\]{},&*!|>'\"%@`]*", text) and text.lower() not in (
        "null true false yes no on off ~".split()
    )
    return text if plain and text == text.strip() else "'" + text.replace("'", "''") + "'"


def is_setting(word: str) -> bool:
    """Whether a word of the command line is `key.sub=value`, and no path."""
    return re.match(r"[A-Za-z_][\w.]*=", word) is not None


# What is varied ---------------------------------------------------------------------------------------------


def seeds(text: str) -> tuple[int, ...]:
    """`0-4` or `0,2,7-9`, each once.

    Raises:
        UserError: it is neither.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last - first >= MOST_TASKS:
            raise UserError(f"--seeds {text!r}: write numbers and ranges, such as 0-4 or 0,2,7")
        found += range(first, last + 1)
    return tuple(dict.fromkeys(found))


def axis(text: str) -> tuple[str, tuple[str, ...]]:
    """`model.beta=0.5,1,4`: a key and the values it takes; commas inside brackets belong to the value.

    Raises:
        UserError: it is no such text.
    """
    key, equals, rest = text.partition("=")
    values, depth, current = [], 0, ""
    for character in rest:
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            values.append(current)
            current = ""
        else:
            current += character
    values.append(current)
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key) or not all(value.strip() for value in values):
        raise UserError(f"--grid {text!r}: write key=value,value, such as model.beta=0.5,1,4")
    if key == "seed":
        raise UserError(f"--grid {text!r}: seeds are given with --seeds 0-4")
    return key, tuple(dict.fromkeys(value.strip() for value in values))
