"""What a resumed run may change, and how the doors open a trained run.

Resuming is the same command, so the job asked for now is compared with the job in the checkpoint, key by key,
both resolved. Each key's resume policy (`vaedist.config.settings.resume_policy`, also of the variant's own settings)
says what a difference means: free, only with `--override` and recorded, or never. The data count by their identity,
a hash of keys, labels, splits and pixels, not by their path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vaedist.config.job import Job, Monitor, Spec
from vaedist.config.settings import ResumePolicy, parse, resume_policy
from vaedist.core.errors import UserError
from vaedist.data.format.index import Index
from vaedist.data.loading.stream import default_lanes
from vaedist.evaluation.metrics.features import default
from vaedist.evaluation.metrics.posterior_collapse import Collapse
from vaedist.evaluation.metrics.sample_metrics import BETTER, is_sample_metric, plain
from vaedist.models.contract import Variant, build
from vaedist.runs.checkpoint import Loaded, chosen_weights, load, resolve, run_folder_of
from vaedist.runs.run_folder import ABSENT, Change, RunFolder

__all__ = [
    "Change",
    "Differences",
    "Run",
    "RunFolder",
    "compare",
    "data_section",
    "enforce",
    "open_run",
    "resolved",
    "resume",
    "same_experiment",
]


# What may change --------------------------------------------------------------------------------------------


class Differences(NamedTuple):
    """Changes by what a resumed run may do with them."""

    free: tuple[Change, ...]
    override: tuple[Change, ...]
    fixed: tuple[Change, ...]


def resolved(job: Job) -> Job:
    """The job with the lanes, the chosen weights and the metric's extractor filled in. Idempotent."""
    data = {"lanes": job.data.lanes or default_lanes(job.train.batch_size)}
    train = {
        "weights": job.train.chosen_weights,
        "monitor": job.train.monitor.model_copy(update={"metric": _monitor(job.train.monitor)}),
    }
    return job.model_copy(
        update={"data": job.data.model_copy(update=data), "train": job.train.model_copy(update=train)}
    )


def _monitor(monitor: Monitor) -> str:
    """The monitored metric; a measure of sample quality with the extractor's hash, without which it means nothing.

    Raises:
        UserError: `mode` says the wrong way of such a measure.
    """
    metric = monitor.metric
    if not is_sample_metric(metric):
        return metric
    better = BETTER[plain(metric)]
    if monitor.mode != better:
        raise UserError(
            f"train.monitor.mode is {monitor.mode!r}, but of {plain(metric)} the {better}imum is best: set "
            f"train.monitor.mode={better}"
        )
    return metric if metric != plain(metric) else f"{metric}[{default().label}]"


def data_section(index: Index) -> dict[str, Any]:
    """What a checkpoint says of the data it was trained on."""
    return {
        "identity": index.identity,
        "shape": list(index.spec.image_shape),
        "classes": list(index.classes),
        "path": str(Path(index.folder).absolute()),
    }


def compare(
    saved: Job, asked: Job, saved_data: Mapping[str, Any], asked_data: Mapping[str, Any]
) -> Differences:
    """The differences between two jobs (resolved here) and between the data they see (`data_section`)."""
    old, new = (resolved(job).model_dump(mode="json") for job in (saved, asked))
    patterns = dict(resume_policy(Job))
    del patterns["model"]
    patterns |= dict(resume_policy(type(asked.model), "model."))
    if saved.kind != asked.kind:  # the rest of two variants' settings has nothing in common
        old["model"], new["model"] = ({"kind": side["model"]["kind"]} for side in (old, new))
    found: dict[ResumePolicy, list[Change]] = {"free": [], "override": [], "fixed": []}
    for change in _changes("", old, new):
        found[_mark(change.key, patterns)].append(change)
    for key in ("identity", "shape", "classes"):
        if saved_data[key] != asked_data[key]:
            found["fixed"].insert(0, Change(f"data {key}", saved_data[key], asked_data[key]))
    return Differences(*(tuple(found[mark]) for mark in ("free", "override", "fixed")))


def enforce(differences: Differences, override: bool, run_folder: Path) -> None:
    """Refuse what a resumed run may not change.

    Raises:
        UserError: naming each key, its old and its new value, and the ways out.
    """
    afresh = (
        f"start a new run beside it with --new-run (add init_from={run_folder} to begin with its weights)"
    )
    if differences.fixed:
        told = "; ".join(str(change) for change in differences.fixed)
        raise UserError(
            f"cannot resume {run_folder}: {told}. That never changes in a run: set it back, or {afresh}"
        )
    if differences.override and not override:
        told = "; ".join(str(change) for change in differences.override)
        raise UserError(
            f"cannot resume {run_folder} just so: {told}. Set it back, or accept and record the change with "
            f"--override, or {afresh}"
        )


def resume(
    run: RunFolder, found: Loaded | None, job: Job, index: Index, *, override: bool = False
) -> tuple[Change, ...]:
    """Compare a checkpoint's job and data with the asked ones; the changes that are allowed and worth a record.

    Raises:
        UserError: as `enforce`.
    """
    if found is None:
        return ()
    saved = parse(Job, found.state["job"], where=str(found.path))
    differences = compare(saved, job, found.state["data"], data_section(index))
    enforce(differences, override, run.path)
    return differences.free + differences.override


def _changes(prefix: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changes(f"{prefix}{key}.", before, after)
        elif before != after:
            yield Change(f"{prefix}{key}", before, after)


def _mark(key: str, patterns: Mapping[str, ResumePolicy]) -> ResumePolicy:
    """The mark of a key: of its field, of the section it lies in, or the strictest of the fields below it."""
    parts = key.split(".")
    below: set[ResumePolicy] = set()
    for pattern, mark in patterns.items():
        names = pattern.split(".")
        if all(name in ("*", part) for name, part in zip(names, parts, strict=False)):
            if len(names) <= len(parts):
                return mark
            below.add(mark)
    return next((mark for mark in ("fixed", "override", "free") if mark in below), "fixed")


# Opening ----------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A trained model and what it knows of itself."""

    model: Variant
    """In eval mode, with the chosen weights."""
    job: Job
    spec: Spec
    step: int
    weights: str
    """`ema` or `raw`."""
    data_identity: str
    data_path: str
    classes: tuple[str, ...]
    checkpoint: Path
    folder: Path
    """Where doors write: the run folder, or the checkpoint's own for one that was moved out of its run."""
    collapse: Collapse | None = None
    """The alarm of the last validation before the checkpoint: who looks at samples should know."""


def open_run(path: str | Path, *, weights: str | None = None, device: torch.device | str = "cpu") -> Run:
    """A trained model from a run folder (its best checkpoint, else its newest) or from a checkpoint folder.

    Args:
        path: Either folder.
        weights: `ema` or `raw`; default: what the job says everything downstream uses.
        device: Where the model goes.

    Raises:
        UserError: there is no such run, or the checkpoint is damaged or of another making.
    """
    loaded = load(resolve(path))
    try:
        saved, data = loaded.state["job"], loaded.state["data"]
        channels, height, width = (int(size) for size in data["shape"])
        classes = tuple(str(name) for name in data["classes"])
        identity, data_path = str(data["identity"]), str(data["path"])
        state = chosen_weights(loaded.state, weights)
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"checkpoint {loaded.path} lacks what vaedist-train writes: it is of another making"
        ) from None
    job = parse(Job, saved, where=str(loaded.path))
    spec = Spec(channels, (height, width), len(classes))
    model = build(job.model, spec, job.seed)
    model.to(device, torch.float64 if job.train.precision == "fp64" else torch.float32)
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the weights in {loaded.path} do not fit its model {job.kind!r}: {reason}") from None
    model.eval().requires_grad_(False)
    return Run(
        model=model,
        job=job,
        spec=spec,
        step=loaded.step,
        weights=weights or job.train.chosen_weights,
        data_identity=identity,
        data_path=data_path,
        classes=classes,
        checkpoint=loaded.path,
        folder=run_folder_of(loaded.path) or loaded.path,
        collapse=Collapse.read(loaded.state.get("collapse"), loaded.path),
    )


# Seeds ------------------------------------------------------------------------------------------------------

_OF_A_SEED = {"seed", "model.tokenizer.sha256", "model.tokenizer.seed"}
"""What differs between repetitions of one experiment; a prior's tokenizer may be a repetition too."""
_LENGTH = {"train.steps", "train.epochs"}


def same_experiment(one: Run, other: Run) -> bool:
    """Whether two runs differ in nothing that matters but their seed: repetitions, whose spread is worth stating."""
    data = [
        {"identity": run.data_identity, "shape": list(run.spec.image_shape), "classes": list(run.classes)}
        for run in (one, other)
    ]
    found = compare(one.job, other.job, *data)
    changed = {change.key for change in found.free + found.override + found.fixed}
    free = {change.key for change in found.free} - _LENGTH
    return one.weights == other.weights and changed - free <= _OF_A_SEED
