"""`fit`: the one training loop, the same in one process, under torchrun, under srun, and in a Ray Train worker.

`prepare` (`vaedist.training.session`) opens and builds everything; `train` below takes the steps. What a run decides
(stop, skip, best, plateau, early stop) it decides from numbers that have the same bits on every rank.

Resuming is starting: the newest sound checkpoint in the run folder wins, rank 0 reads it and the others receive
it. Training noise, sample order and learning rate are functions of the step, so nothing else has to be restored,
and the curve continues with the same digits.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vaedist.config.job import Job
from vaedist.core.errors import Diverged, UserError, did_you_mean
from vaedist.distributed.liveness.stalls import StallReport, print_to_stderr
from vaedist.distributed.memory import enough_memory, keep_freed_memory
from vaedist.distributed.process_group import Group
from vaedist.runs.checkpoint import Best
from vaedist.runs.fit_options import FitOptions, Outcome
from vaedist.runs.resume_rules import data_section
from vaedist.runs.startup_timings import startup_summary
from vaedist.training.session import Session, prepare
from vaedist.training.step import StepResult, phase_suffix
from vaedist.training.validation import validate

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
            session = prepare(job, run_folder, group, options, exits)
            return session if isinstance(session, Outcome) else train(session, report, reached)


def train(session: Session, report: Report | None, reached: Reached) -> Outcome:
    """Take the steps that are left, until the last one, an early stop, or a stop request. Collective."""
    settings, progress, log = session.job.train, session.progress, session.log
    train_step, committer = session.train_step, session.storage.committer
    step = start = session.storage.start
    finished = False
    batches = session.streams.training.batches(start)
    session.model.train()
    reached("resumed")
    ready = time.time()

    while not finished:
        # Take this rank's rows of the next global batch.
        batch = next(batches)
        if step == start:
            train_step.warm_up(batch, step)

        # Step. A rank may not stand still meanwhile, except where a body may be compiled anew, which takes minutes.
        with session.group.stall_monitor.strict(step > start and not settings.compile):
            result = train_step(batch, step, session.total_steps, session.stop.requested)
        step += 1
        if step == start + 1:
            reached("stepped")
            _log_startup(session, ready)
        if committer is not None:
            committer.join(wait=False)  # raises now what a full disk did to the last checkpoint

        # Average the weights. A refused step changes nothing but the count; too many in a row end the run.
        if result.accepted:
            progress.accepted(result.terms, train_step.rows)
            if session.average:
                session.average.update(step * settings.batch_size, settings.batch_size)
        else:
            _refuse(session, step, result.refused_because)

        # Log the mean of every term since the last row.
        finished = step >= session.total_steps
        if step % settings.log_every == 0 or finished:
            _log_training(session, step, result, report)

        # Validate. The result decides the best checkpoint, learning rates on a plateau, and an early stop.
        best: Best | None = None
        if step % settings.validate_every == 0 or finished:
            best = _validate(session, step, report)
            if progress.stops_early(session.job):
                finished = True
                log.message(f"step {step}: no better for {progress.waited} validations, stopping early")

        # Save, in the background.
        if finished or result.stop or best or step % settings.save_every == 0:
            _save(session, step, best)

        # Stop, on all ranks after the same step.
        if result.stop and not finished:
            break
    return _finish(session, step, finished)


def _log_startup(session: Session, ready: float) -> None:
    """Where the time went before the first step, which began at `ready`."""
    if session.options.startup:
        phases = (*session.options.startup, ("data and model", session.began), ("first step", ready))
        session.log.message(startup_summary(phases, time.time()))


def _refuse(session: Session, step: int, reason: str) -> None:
    """Count a step with non-finite numbers.

    Raises:
        Diverged: there were too many in a row.
    """
    session.progress.refused()
    session.log.message(f"step {step}: skipped, non-finite {reason}")
    in_a_row = session.progress.bad_in_a_row
    if in_a_row >= session.job.train.max_bad_steps:
        raise Diverged(
            f"{in_a_row} steps in a row up to step {step} were non-finite in {reason}: lower the learning rate or "
            "set a clip (train.optim.*.learning_rate, train.optim.*.clip), then continue with --override"
        )


def _log_training(session: Session, step: int, result: StepResult, report: Report | None) -> None:
    stream = session.streams.training
    row = session.progress.row() | result.scalars
    for phase in session.train_step.phases:
        row[f"learning_rate{phase_suffix(session.model, phase.name)}"] = phase.learning_rate
    images, epoch = step * session.job.train.batch_size, step / stream.steps_per_epoch
    session.log.train(step, row, images=images, epoch=epoch, wait_seconds=stream.wait_seconds)
    if report:
        report({"step": float(step), **row})


def _validate(session: Session, step: int, report: Report | None) -> Best | None:
    """Measure the validation split, and decide what depends on it; the new best, if it is.

    Raises:
        UserError: the monitored metric is none of the measured ones.
    """
    job, log, model = session.job, session.log, session.model
    with log.pause():
        numbers, samples = validate(
            session.evaluated_model, session.streams.validation, job, session.group, step
        )
    metric = job.train.monitor.metric
    if metric not in numbers:
        raise UserError(f"train.monitor.metric: unknown metric {metric!r}{did_you_mean(metric, numbers)}")
    schedules_ended = step >= model.schedule_end
    improved = session.progress.validated(numbers, job, schedules_ended)
    for phase in session.train_step.phases:
        if schedules_ended and phase.plateau and phase.plateau.step(numbers[metric]):
            log.message(f"step {step}: no better for a while, learning rate of {phase.name!r} cut")
    log.validate(step, numbers, best=improved)
    with log.pause():
        session.figures.update(step, session.evaluated_model, samples)
    model.train()
    if report:
        report({"step": float(step), **{f"validation/{name}": value for name, value in numbers.items()}})
    return Best(metric, numbers[metric]) if improved else None


def _save(session: Session, step: int, best: Best | None) -> None:
    """Hand a copy of the state to the thread that writes checkpoints. Collective."""
    # Progress adds numbers over all ranks; the rest of the state is the same on each, so rank 0 copies it alone.
    progress = session.progress.state()
    committer = session.storage.committer
    if committer is None:
        return
    phases = {phase.name: phase.state() for phase in session.train_step.phases}
    state = {
        "step": step,
        "model": session.model.state_dict(),
        "ema": session.average.model.state_dict() if session.average else None,
        "optim": {name: optimizer for name, (optimizer, _) in phases.items()},
        "sched": {name: plateau for name, (_, plateau) in phases.items()},
        "progress": progress,
        "collapse": session.figures.state(),
        "job": session.job.model_dump(mode="json"),
        "data": data_section(session.index),
    }
    committer.submit(on_cpu(state), step, best)
    if session.options.verbose:
        session.log.message(f"step {step}: a checkpoint goes to {committer.checkpoints.folder}")


def on_cpu(value: Any) -> Any:
    """A copy of a state in the CPU's memory, which training can no longer change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_cpu(inner) for key, inner in value.items()}
    return [on_cpu(inner) for inner in value] if isinstance(value, list | tuple) else value


def _finish(session: Session, step: int, finished: bool) -> Outcome:
    """Wait on all ranks until the last checkpoint is on the disk, and say how the attempt ended. Collective."""
    run, committer, total = session.storage.run, session.storage.committer, session.total_steps

    def last_write() -> bytes:
        if committer is not None:
            committer.join()
        return b""

    session.group.from_leader(last_write)
    validation = session.progress.validation
    if run is not None:
        run.stop.unlink(missing_ok=True)  # it was obeyed or came too late: it must not stop the next attempt
        if finished:
            run.finish(step, "length" if step >= total else "early stop", validation)
    session.log.message(
        f"finished after {step} steps"
        if finished
        else f"stopped on request after step {step} of {total}: checkpoint saved, the same command continues"
    )
    return Outcome("finished" if finished else "stopped", step, validation)
