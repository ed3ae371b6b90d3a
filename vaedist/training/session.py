"""`prepare`: all that a run needs before its first step, from the data to the log.

The order is part of the contract: several of these paragraphs are collective, so every rank runs through them alike.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vaedist.config.job import Job
from vaedist.config.settings import expand
from vaedist.core.errors import UserError, did_you_mean
from vaedist.data.format.index import Index
from vaedist.data.loading.inputs import EvaluationInputs, Inputs
from vaedist.data.loading.order import slice_bounds
from vaedist.data.loading.staging import stage_shards
from vaedist.data.loading.stream import (
    EvaluationStream,
    EvaluationStreamConfig,
    TrainingStream,
    TrainingStreamConfig,
)
from vaedist.distributed.contexts import DistributedLaneContext
from vaedist.distributed.process_group import Group
from vaedist.models.bases.layer_table import layer_table
from vaedist.models.contract import Variant, build
from vaedist.runs.checkpoint import Checkpoints, Committer
from vaedist.runs.checkpoint_manifest import LoadedCheckpoint, checkpoint_from_bytes, checkpoint_to_bytes
from vaedist.runs.fit_options import FitOptions, Outcome
from vaedist.runs.provenance import Change, library_versions
from vaedist.runs.resolved_job import resolved
from vaedist.runs.resume_rules import check_resume
from vaedist.runs.run_folder import RunFolder
from vaedist.runs.run_lock import RunLock
from vaedist.runs.stop_request import StopRequest
from vaedist.training.ema import WeightAverage
from vaedist.training.initialization import Initialization, init_weights
from vaedist.training.loader_settings import LoaderSettings, choose_loader_settings
from vaedist.training.progress import Progress
from vaedist.training.run_log import RunLog, SilentLog
from vaedist.training.step import TrainStep
from vaedist.training.tokenizer_codes import code_shards, resolve_tokenizer
from vaedist.training.validation import check_monitor, check_monitored_term
from vaedist.training.validation_figures import ValidationFigures

_STOPPED = "stopped on request while the codes were made: those that are finished are kept, the same command continues"


@dataclass
class Storage:
    """The run on the disk. Only rank 0 opens the folder; every rank receives the newest checkpoint."""

    run: RunFolder | None = None
    committer: Committer | None = None
    changed: tuple[Change, ...] = ()
    newest: LoadedCheckpoint | None = None

    @property
    def start(self) -> int:
        """Steps done before this attempt."""
        return self.newest.step if self.newest else 0


@dataclass(frozen=True)
class Streams:
    """What the model reads."""

    training: TrainingStream
    validation: EvaluationInputs
    settings: LoaderSettings
    inputs: Inputs


@dataclass
class Session:
    """One attempt at a run, ready for its first step."""

    job: Job
    """Resolved."""
    index: Index
    group: Group
    options: FitOptions
    stop: StopRequest
    storage: Storage
    streams: Streams
    model: Variant
    average: WeightAverage | None
    train_step: TrainStep
    progress: Progress
    initialization: Initialization
    total_steps: int
    began: float
    """Seconds since the epoch."""
    log: RunLog | SilentLog = field(default_factory=SilentLog)
    figures: ValidationFigures = field(init=False)

    @property
    def evaluated_model(self) -> Variant:
        """The model with the weights that the job chose: averaged, or the trained ones."""
        return self.average.model if self.average and self.job.train.chosen_weights == "ema" else self.model


def prepare(
    job: Job, folder: Path, group: Group, options: FitOptions, exits: contextlib.ExitStack
) -> Session | Outcome:
    """Open the data and the run folder, and build the model and all that trains it. Collective.

    Args:
        job: As asked for.
        folder: The run folder; made if missing.
        group: The processes.
        options: Of this attempt.
        exits: Closes what is opened here.

    Returns:
        The session; or how the attempt ended, where the run had nothing left to do or was stopped meanwhile.

    Raises:
        UserError: on every rank.
    """
    began = time.time()
    _set_threads(job, group, options)
    stop = exits.enter_context(StopRequest(folder / "stop" if group.leads else None, options.attempt))

    def announce(text: str) -> None:
        """A line on the console while there is no log yet."""
        if group.leads and not options.quiet:
            print(text, flush=True)

    # The job with all defaults, and the data.
    job = resolved(job)
    index = Index.open(expand(job.data.path, "data.path"))
    job = resolve_tokenizer(job, index, group)

    # The run folder, and how far the run has come.
    storage = _open_storage(folder, job, index, group, options, exits)
    newest, start = storage.newest, storage.start
    progress = Progress(group, newest.state["progress"] if newest else None)
    steps_per_epoch = index.split(job.data.train_split).count // job.train.batch_size
    total_steps = job.train.steps or math.ceil((job.train.epochs or 0) * steps_per_epoch)
    if newest and (start >= total_steps or progress.stops_early(job)):
        return Outcome("already finished", start, progress.validation)

    # The model, and its first weights: from the seed, the newest checkpoint, or another run.
    model = build(job.model, index.spec, job.seed)
    model.to(group.device, torch.float64 if job.train.precision == "fp64" else torch.float32)
    check_phases(job, model)
    check_monitor(job, model)
    initialization = init_weights(model, job, newest, group)

    # The streams of images or codes.
    source = index if model.reads == "images" else code_shards(model, job, index, group, stop, announce)
    if source is None:
        if storage.run is not None:
            storage.run.stop.unlink(missing_ok=True)
        announce(_STOPPED)
        return Outcome("stopped", start, progress.validation)
    splits = (job.data.train_split, job.data.validation_split)
    local = stage_shards(source, splits, group=group, report=announce, stopped=lambda: stop.requested)
    streams = _open_streams(exits.enter_context(local), job, model, group, total_steps - start, exits)
    check_monitored_term(job, model, streams.validation)

    # The weights on every rank, their average, and the optimizers with what a checkpoint holds of them.
    _measure_data(model, job, group, streams, initialization)
    group.synchronize(model)
    if job.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = _average(model, job, newest)
    for name in model.compiled if job.train.compile else ():
        # Not `Module.compile()`: on a torch.nn.Sequential it does nothing, without a word.
        body = getattr(model, name)
        body.forward = torch.compile(body.forward)
    train_step = TrainStep(job, group, model, _lanes(job), _rows(job, group), streams.inputs)
    initialization.load_optimizers(train_step.phases)

    # The log, which only rank 0 writes.
    session = Session(
        job, index, group, options, stop, storage, streams, model, average, train_step, progress,
        initialization, total_steps, began,
    )  # fmt: skip
    _open_log(session, exits)
    return session


def _set_threads(job: Job, group: Group, options: FitOptions) -> None:
    """Threads decide the order of sums on a CPU, so the job fixes them, not the launcher."""
    share = options.threads or max(1, len(os.sched_getaffinity(0)) // group.local_world)
    torch.set_num_threads(job.train.threads or share)


def _lanes(job: Job) -> int:
    assert job.data.lanes is not None, "the job is resolved"
    return job.data.lanes


def _rows(job: Job, group: Group) -> tuple[int, int]:
    return slice_bounds(job.train.batch_size, group.rank, group.world)


def _open_storage(
    folder: Path, job: Job, index: Index, group: Group, options: FitOptions, exits: contextlib.ExitStack
) -> Storage:
    """Rank 0 takes the run's lock, looks for a sound checkpoint and compares its job with this one."""
    storage = Storage()

    def open_folder() -> bytes:
        run = RunFolder.make(folder)
        lock = (
            RunLock.holding(folder, options.token)
            if options.token
            else exits.enter_context(RunLock.acquire(folder))
        )
        checkpoints = Checkpoints(folder, keep=job.train.keep)
        newest = checkpoints.newest()
        storage.changed = check_resume(run.path, newest, job, index, override=options.override)
        storage.run, storage.committer = run, Committer(checkpoints, lock.check)
        exits.callback(storage.committer.close)
        return checkpoint_to_bytes(newest)

    storage.newest = checkpoint_from_bytes(group.from_leader(open_folder))
    return storage


def _open_streams(
    source: Index, job: Job, model: Variant, group: Group, steps: int, exits: contextlib.ExitStack
) -> Streams:
    """Training batches without end, and the validation split; `steps` are still to be taken."""
    batch_size = job.train.batch_size
    settings = choose_loader_settings(job.data, source, steps * batch_size, group, torch.get_num_threads())
    share: Any = {"batch_size": batch_size, "device": group.device, "rank": group.rank, "world": group.world}
    config = TrainingStreamConfig(
        lanes=_lanes(job),
        seed=job.seed,
        cache=settings.cache,
        static_transform=Inputs(job).static_transform if model.reads == "images" else None,
        workers=settings.readers[settings.cache],
        group=group,
        **share,
    )
    training = TrainingStream(source, job.data.train_split, config)
    exits.callback(training.close)
    training.workers = settings.readers[training.cache]  # a cache may not have fitted
    all_once = EvaluationStreamConfig(workers=settings.readers["none"], **share)
    validation = EvaluationInputs(EvaluationStream(source, job.data.validation_split, all_once), job)
    return Streams(training, validation, settings, Inputs(job, transformed=training.transformed))


def _measure_data(
    model: Variant, job: Job, group: Group, streams: Streams, initialization: Initialization
) -> None:
    """Show a new model the first batches: for the k-means start of a codebook, or the data's variance."""
    if not initialization.prepares:
        return
    ctx = DistributedLaneContext(
        group, seed=job.seed, step=0, phase="prepare", batch_size=job.train.batch_size, lanes=_lanes(job),
        rows=_rows(job, group),
    )  # fmt: skip
    batches = streams.training.batches(0)
    with torch.no_grad():
        model.prepare([streams.inputs(next(batches), ctx) for _ in range(model.prepare_batches)], ctx)
    initialization.restore_imported(model)


def _average(model: Variant, job: Job, newest: LoadedCheckpoint | None) -> WeightAverage | None:
    """The average of the weights, if the job wants one: a copy of them, or what the checkpoint holds."""
    if not job.train.ema_half_life:
        return None
    average = WeightAverage(model, job.train.ema_half_life)
    if newest and newest.state["ema"]:
        average.model.load_state_dict(newest.state["ema"])
    return average


def check_phases(job: Job, model: Variant) -> None:
    """Raises:
    UserError: the job has an optimizer for a phase that the model lacks, or none for one that it has.
    """
    for name in job.train.optim:
        if name not in model.phases:
            raise UserError(f"train.optim: unknown phase {name!r}{did_you_mean(name, model.phases)}")
    for name in model.phases:
        if name not in job.train.optim:
            raise UserError(
                f"train.optim.{name} is missing: this model trains the phases {', '.join(model.phases)}"
            )


def model_summary(job: Job) -> str:
    """The layer table of the job's model; needs the data, whose shape the model follows.

    Raises:
        UserError: the job's data or model section is wrong.
    """
    index = Index.open(expand(job.data.path, "data.path"))
    job = resolve_tokenizer(job, index, Group(torch.device("cpu")))
    return layer_table(build(job.model, index.spec, job.seed).eval())


# The log ----------------------------------------------------------------------------------------------------


def _open_log(session: Session, exits: contextlib.ExitStack) -> None:
    """Rank 0 records this start in the run folder, cuts rows beyond the resume step, and prints what will run."""
    storage = session.storage
    if storage.run is not None:
        _begin_run(session, storage.run)
    exits.enter_context(_closed(session.log))
    saved = storage.newest.state if storage.newest else None
    session.figures = ValidationFigures(storage.run, session.log, session.job, session.index.classes, saved)


def _begin_run(session: Session, run: RunFolder) -> None:
    options, initialization, start = session.options, session.initialization, session.storage.start
    run.record_start(
        session.job,
        step=start if session.storage.newest else None,
        initialization=initialization.record,
        changed=session.storage.changed,
        engine=options.engine,
        world=session.group.world,
        attempt=options.attempt,
        command=options.command or None,
    )
    session.log = log = RunLog(
        run, session.job, total_steps=session.total_steps, start_step=start, quiet=options.quiet
    )
    log.summary(_summary(session))
    if options.verbose:
        log.message(library_versions())
    if initialization.report:
        log.message("\n".join(initialization.report))


@contextlib.contextmanager
def _closed(log: RunLog | SilentLog) -> Iterator[None]:
    """Close the log at the end; an error of closing must not hide the error that ended the run."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(UserError):
            log.close()
        raise
    log.close()


def _summary(session: Session) -> dict[str, str]:
    """Name and value of each line that is printed at the start."""
    job, index, model, group = session.job, session.index, session.model, session.group
    training, train = session.streams.training, job.train
    split = index.split(job.data.train_split)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    rest = split.count - training.steps_per_epoch * train.batch_size
    left_out = (
        f" ({rest} of them, other ones each epoch, do not fill a batch and are left out)" if rest else ""
    )
    uncompiled = [f"; not {name}: {reason}" for name, reason in model.uncompiled.items()]
    return {
        "data": f"{index.folder}: {split.count} training images {'x'.join(map(str, index.spec.image_shape))}"
        f"{left_out}, {index.split(job.data.validation_split).count} validation images",
        "reads": session.streams.settings.describe(training.cache),
        "model": f"{job.kind}, {parameters:,} parameters" + (f", {frozen:,} of them frozen" * bool(frozen)),
        "device": f"{group.world} x {group.device}, {torch.get_num_threads()} threads each, {train.precision}",
        "engine": session.options.engine,
        "batch": f"{train.batch_size} ({training.steps_per_epoch} steps per epoch)",
        **({"compile": ", ".join(model.compiled) + "".join(uncompiled)} if train.compile else {}),
        "start": session.initialization.description,
        "steps": f"{session.storage.start} to {session.total_steps}",
    }
