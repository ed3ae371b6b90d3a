"""`fit`: the one loop, unchanged in one process, under torchrun, under srun, and inside a Ray Train worker.

Read `fit` from top to bottom; there is nothing behind it but the rooms it names. A step is: take this rank's rows
of global batch t, pass over the phases, average the weights, and at counted steps log, validate and save. What a
run decides (stop, skip, best, plateau, early stop) is decided from numbers that are the same bits on every rank.

Resuming is starting: the newest sound checkpoint in the run folder wins, rank 0 reads it and the others receive
it. Training noise, sample order and learning rate are functions of the step, so nothing else has to be restored,
and the curve goes on digit for digit.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from vaedist.config.job import Job
from vaedist.config.settings import expand
from vaedist.core.errors import Diverged, UserError, did_you_mean
from vaedist.data.format.index import Index
from vaedist.data.loading.inputs import Inputs
from vaedist.data.loading.order import slice_bounds
from vaedist.data.loading.staging import stage_shards
from vaedist.data.loading.stream import (
    EvaluationStream,
    EvaluationStreamConfig,
    TrainingStream,
    TrainingStreamConfig,
)
from vaedist.distributed.contexts import DistributedLaneContext
from vaedist.distributed.liveness.stalls import StallReport, print_to_stderr
from vaedist.distributed.memory import enough_memory, keep_freed_memory
from vaedist.distributed.process_group import Group
from vaedist.models.contract import Variant, build
from vaedist.runs.checkpoint import Best, Checkpoints, Committer
from vaedist.runs.checkpoint_manifest import checkpoint_from_bytes, checkpoint_to_bytes
from vaedist.runs.fit_options import FitOptions, Outcome
from vaedist.runs.provenance import Change, library_versions
from vaedist.runs.resolved_job import resolved
from vaedist.runs.resume_rules import check_resume, data_section
from vaedist.runs.run_folder import RunFolder
from vaedist.runs.run_lock import RunLock
from vaedist.runs.startup_timings import startup_summary
from vaedist.runs.stop_request import StopRequest
from vaedist.training.ema import WeightAverage
from vaedist.training.initialization import Initialization, init_weights
from vaedist.training.loader_settings import LoaderSettings, choose_loader_settings
from vaedist.training.progress import Progress
from vaedist.training.run_log import RunLog, SilentLog
from vaedist.training.step import TrainStep
from vaedist.training.tokenizer_codes import code_shards, resolve_tokenizer
from vaedist.training.validation import check_monitor, check_monitored_term, validate
from vaedist.training.validation_figures import ValidationFigures

Report = Callable[[dict[str, float]], None]
Reached = Callable[[str], None]


def fit(
    job: Job,
    run_folder: Path,
    *,
    group: Group | None = None,
    report: Report | None = None,
    options: FitOptions = FitOptions(),  # noqa: B008 - frozen
    reached: Reached = lambda _: None,
    stuck: StallReport = print_to_stderr,
) -> Outcome:
    """Train `job` in `run_folder`, from its newest checkpoint or from the start.

    Args:
        job: The job as asked for.
        run_folder: Made if missing (0700).
        group: The processes; default: `Group.join()`, closed at the end.
        report: Called on every rank with the same numbers at every log and validation step.
        options: Of this attempt.
        reached: Called on every rank at `resumed` (all is read, the first step is next) and at `stepped` (it is done).
        stuck: Takes the last sentence of a rank that is ended because it stands still; from another thread.

    Raises:
        UserError: anything the user can mend; on every rank, but for a lack of memory, which one rank may meet alone.
    """
    with contextlib.ExitStack() as exits:
        if group is None:
            group = Group.join()
            exits.callback(group.close)
        exits.enter_context(group.watched(options.hang_seconds, run_folder, stuck))
        keep_freed_memory()
        with enough_memory(group):
            return _fit(job, run_folder, group, report, options, reached, exits)


def _fit(
    job: Job,
    folder: Path,
    group: Group,
    report: Report | None,
    options: FitOptions,
    reached: Reached,
    exits: contextlib.ExitStack,
) -> Outcome:
    began = time.time()
    # Settle the process: threads decide the order of sums on a CPU, so the loop fixes them, not the launcher.
    share = options.threads or max(1, len(os.sched_getaffinity(0)) // group.local_world)
    torch.set_num_threads(job.train.threads or share)
    stop = exits.enter_context(StopRequest(folder / "stop" if group.leads else None, options.attempt))

    def tell(text: str) -> None:
        """A line on the console while there is no log yet."""
        if group.leads and not options.quiet:
            print(text, flush=True)

    # The data, what they look like to a model, and what the job says of other runs.
    job = resolved(job)
    index = Index.open(expand(job.data.path, "data.path"))
    job = resolve_tokenizer(job, index, group)
    lanes = job.data.lanes
    assert lanes is not None
    batch_size = job.train.batch_size
    bounds = slice_bounds(batch_size, group.rank, group.world)

    # The run folder is rank 0's: it takes the lock, looks for a sound checkpoint and compares the jobs.
    run: RunFolder | None = None
    committer: Committer | None = None
    changed: tuple[Change, ...] = ()

    def open_folder() -> bytes:
        nonlocal run, committer, changed
        run = RunFolder.make(folder)
        lock = (
            RunLock.holding(folder, options.token)
            if options.token
            else exits.enter_context(RunLock.acquire(folder))
        )
        store = Checkpoints(folder, keep=job.train.keep)
        newest = store.newest()
        changed = check_resume(run.path, newest, job, index, override=options.override)
        committer = Committer(store, lock.check)
        exits.callback(committer.close)
        return checkpoint_to_bytes(newest)

    found = checkpoint_from_bytes(group.from_leader(open_folder))
    start = found.step if found else 0
    progress = Progress(group, found.state["progress"] if found else None)
    steps_per_epoch = index.split(job.data.train_split).count // batch_size
    total = job.train.steps or math.ceil((job.train.epochs or 0) * steps_per_epoch)
    early = job.train.early_stop
    if found and (start >= total or (early and progress.waited >= early)):
        return Outcome("already finished", start, progress.validation)

    # The model. Its weights are a function of (model, data shape, seed), or come from a checkpoint or another run.
    model = build(job.model, index.spec, job.seed)
    model.to(group.device, torch.float64 if job.train.precision == "fp64" else torch.float32)
    _check_phases(job, model)
    check_monitor(job, model)
    initialization = init_weights(model, job, found, group)

    # What it reads: images, or the codes that its tokenizer gives to each of them.
    source = index if model.reads == "images" else code_shards(model, job, index, group, stop, tell)
    if source is None:
        return _stopped_early(run, start, progress, tell)
    read = (job.data.train_split, job.data.validation_split)
    source = exits.enter_context(
        stage_shards(source, read, group=group, report=tell, stopped=lambda: stop.requested)
    )
    how = choose_loader_settings(
        job.data, source, (total - start) * batch_size, group, torch.get_num_threads()
    )
    mine: dict[str, Any] = {"device": group.device, "rank": group.rank, "world": group.world}
    stream = TrainingStream(
        source,
        job.data.train_split,
        TrainingStreamConfig(
            batch_size=batch_size,
            lanes=lanes,
            seed=job.seed,
            cache=how.cache,
            static_transform=Inputs(job).static_transform if model.reads == "images" else None,
            workers=how.readers[how.cache],
            group=group,
            **mine,
        ),
    )
    exits.callback(stream.close)
    stream.workers = how.readers[stream.cache]  # a cache may not have fitted
    inputs = Inputs(job, transformed=stream.transformed)
    held_out = EvaluationStream(
        source,
        job.data.validation_split,
        EvaluationStreamConfig(batch_size=batch_size, workers=how.readers["none"], **mine),
    )

    check_monitored_term(job, model, held_out)

    # What a model measures on the data before its first step.
    if initialization.prepares:
        ctx = DistributedLaneContext(
            group, seed=job.seed, step=0, phase="prepare", batch_size=batch_size, lanes=lanes, rows=bounds
        )
        first = stream.batches(0)
        with torch.no_grad():
            model.prepare([inputs(next(first), ctx) for _ in range(model.prepare_batches)], ctx)
        initialization.restore_imported(model)
    group.synchronize(model)
    if job.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = WeightAverage(model, job.train.ema_half_life) if job.train.ema_half_life else None
    if job.train.compile:
        for name in model.compiled:
            # Not `Module.compile()`: on a torch.nn.Sequential it does nothing, silently (seen with torch 2.13).
            body = getattr(model, name)
            body.forward = torch.compile(body.forward)

    # Optimizers, and what they and the average had learnt.
    train_step = TrainStep(job, group, model, lanes, bounds, inputs)
    initialization.load_optimizers(train_step.phases)
    if found and average and found.state["ema"]:
        average.model.load_state_dict(found.state["ema"])
    chosen = average.model if average and job.train.chosen_weights == "ema" else model

    # Watching: rank 0 writes TensorBoard, metrics.jsonl and the console; rows beyond the resume step are cut.
    log: RunLog | SilentLog = SilentLog()
    if run is not None:
        run.record_start(
            job,
            step=start if found else None,
            initialization=initialization.record,
            changed=changed,
            engine=options.engine,
            world=group.world,
            attempt=options.attempt,
            command=options.command or None,
        )
        log = RunLog(run, job, total_steps=total, start_step=start, quiet=options.quiet)
        log.summary(_summary(job, index, stream, how, model, group, options, initialization, start, total))
        if options.verbose:
            log.message(library_versions())
        if initialization.report:
            log.message("\n".join(initialization.report))
    exits.enter_context(_closed(log))
    figures = ValidationFigures(run, log, job, index.classes, found.state if found else None)

    def save(step: int, best: Best | None) -> None:
        # Progress talks to all ranks; the rest of a snapshot is the same on each, so rank 0 takes it alone.
        state_of_progress = progress.state()
        if committer is None:
            return
        optim, sched = {}, {}
        for phase in train_step.phases:
            optim[phase.name], sched[phase.name] = phase.state()
        state = {
            "step": step,
            "model": model.state_dict(),
            "ema": average.model.state_dict() if average else None,
            "optim": optim,
            "sched": sched,
            "progress": state_of_progress,
            "collapse": figures.state(),
            "job": job.model_dump(mode="json"),
            "data": data_section(index),
        }
        committer.submit(on_cpu(state), step, best)
        if options.verbose:
            log.message(f"step {step}: a checkpoint goes to {folder / 'checkpoints'}")

    # The loop. `done` counts finished steps; global batch `done` is the next one to take.
    batches = stream.batches(start)
    done, finished = start, False
    model.train()
    reached("resumed")
    ready = time.time()
    while not finished:
        batch = next(batches)
        if done == start:
            train_step.warm_up(batch, done)
        # A compiled body may be compiled anew at any step, which takes minutes.
        with group.stall_monitor.strict(done > start and not job.train.compile):
            result = train_step(batch, done, total, stop.requested)
        done += 1
        if done == start + 1:
            reached("stepped")
            if options.startup:
                phases = (*options.startup, ("data and model", began), ("first step", ready))
                log.message(startup_summary(phases, time.time()))
        if committer is not None:
            committer.join(wait=False)  # a full disk is told now, not when the next checkpoint is due
        images = done * batch_size

        # A refused step moves nothing but the count; too many in a row end the run.
        if result.accepted:
            progress.accepted(result.terms, bounds[1] - bounds[0])
            if average:
                average.update(images, batch_size)
        else:
            progress.refused()
            log.message(f"step {done}: skipped, non-finite {result.refused_because}")
            if progress.bad_in_a_row >= job.train.max_bad_steps:
                raise Diverged(
                    f"{progress.bad_in_a_row} steps in a row up to step {done} were non-finite in "
                    f"{result.refused_because}: lower the learning rate or set a clip "
                    "(train.optim.*.learning_rate, train.optim.*.clip), then continue with --override"
                )

        finished = done >= total
        if done % job.train.log_every == 0 or finished:
            row = progress.row() | result.scalars
            row |= {_rate_name(phase.name, model): phase.learning_rate for phase in train_step.phases}
            log.train(
                done,
                row,
                images=images,
                epoch=done / steps_per_epoch,
                wait_seconds=stream.wait_seconds,
            )
            if report:
                report({"step": float(done), **row})

        # Validation decides best, plateau and early stop, once every loss weight has its final value.
        best: Best | None = None
        if done % job.train.validate_every == 0 or finished:
            with log.pause():
                numbers, samples = validate(chosen, held_out, job, group, done)
            metric = job.train.monitor.metric
            if metric not in numbers:
                raise UserError(
                    f"train.monitor.metric: unknown metric {metric!r}{did_you_mean(metric, numbers)}"
                )
            improved = progress.validated(numbers, job, schedules_ended=done >= model.schedule_end)
            if improved:
                best = Best(metric, numbers[metric])
            if done >= model.schedule_end:
                for phase in train_step.phases:
                    if phase.plateau and phase.plateau.step(numbers[metric]):
                        log.message(
                            f"step {done}: no better for a while, learning rate of {phase.name!r} cut"
                        )
            log.validate(done, numbers, best=improved)
            with log.pause():
                figures.update(done, chosen, samples)
            model.train()
            if report:
                report(
                    {"step": float(done), **{f"validation/{name}": value for name, value in numbers.items()}}
                )
            if early and progress.waited >= early:
                finished = True
                log.message(f"step {done}: no better for {progress.waited} validations, stopping early")

        if finished or result.stop or best or done % job.train.save_every == 0:
            save(done, best)
        if result.stop and not finished:
            break

    # Nobody leaves before the last checkpoint is on the disk.
    def settle() -> bytes:
        if committer is not None:
            committer.join()
        return b""

    group.from_leader(settle)
    status: Literal["finished", "stopped"] = "finished" if finished else "stopped"
    if run is not None:
        run.stop.unlink(missing_ok=True)  # obeyed, or too late: it must not stop the next attempt
    if run is not None and finished:
        run.finish(done, "length" if done >= total else "early stop", progress.validation)
    log.message(_farewell(status, done, total))
    return Outcome(status, done, progress.validation)


@contextlib.contextmanager
def _closed(log: RunLog | SilentLog) -> Iterator[None]:
    """Close the log at the end; where that fails after something else has, the first error is the one to tell."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(UserError):
            log.close()
        raise
    log.close()


# The small parts --------------------------------------------------------------------------------------------


def _farewell(status: str, done: int, total: int) -> str:
    if status == "finished":
        return f"finished after {done} steps"
    return f"stopped on request after step {done} of {total}: checkpoint saved, the same command continues"


def _stopped_early(
    run: RunFolder | None, start: int, progress: Progress, tell: Callable[[str], None]
) -> Outcome:
    """The end of an attempt that was asked to stop before its first step."""
    if run is not None:
        run.stop.unlink(missing_ok=True)
    tell(
        "stopped on request while the codes were made: those that are finished are kept, the same command continues"
    )
    return Outcome("stopped", start, progress.validation)


def _check_phases(job: Job, model: Variant) -> None:
    for name in job.train.optim:
        if name not in model.phases:
            raise UserError(f"train.optim: unknown phase {name!r}{did_you_mean(name, model.phases)}")
    for name in model.phases:
        if name not in job.train.optim:
            raise UserError(
                f"train.optim.{name} is missing: this model trains the phases {', '.join(model.phases)}"
            )


def on_cpu(value: Any) -> Any:
    """A copy of a state in the CPU's memory, which training can no longer change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_cpu(inner) for key, inner in value.items()}
    return [on_cpu(inner) for inner in value] if isinstance(value, list | tuple) else value


def _compiled(model: Variant) -> str:
    left = [f"; not {name}: {reason}" for name, reason in model.uncompiled.items()]
    return ", ".join(model.compiled) + "".join(left)


def _rate_name(phase: str, model: Variant) -> str:
    return "learning_rate" if len(model.phases) == 1 else f"learning_rate/{phase}"


def _summary(
    job: Job,
    index: Index,
    stream: TrainingStream,
    how: LoaderSettings,
    model: Variant,
    group: Group,
    options: FitOptions,
    initialization: Initialization,
    start: int,
    total: int,
) -> dict[str, str]:
    spec, train = index.spec, job.train
    split = index.split(job.data.train_split)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    rest = split.count - stream.steps_per_epoch * train.batch_size
    left_out = (
        f" ({rest} of them, other ones each epoch, do not fill a batch and are left out)" if rest else ""
    )
    return {
        "data": f"{index.folder}: {split.count} training images {'x'.join(map(str, spec.image_shape))}"
        f"{left_out}, {index.split(job.data.validation_split).count} validation images",
        "reads": how.describe(stream.cache),
        "model": f"{job.kind}, {parameters:,} parameters" + (f", {frozen:,} of them frozen" * bool(frozen)),
        "device": f"{group.world} x {group.device}, {torch.get_num_threads()} threads each, {train.precision}",
        "engine": options.engine,
        "batch": f"{train.batch_size} ({stream.steps_per_epoch} steps per epoch)",
        **({"compile": _compiled(model)} if train.compile else {}),
        "start": initialization.description,
        "steps": f"{start} to {total}",
    }
