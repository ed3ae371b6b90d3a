"""Ray Train: the same loop in N Ray workers, on this machine or on a cluster that is already there.

Ray places the processes, starts the group again when one dies or falls silent, and, where the run is elastic (least <
most workers), when a node comes or goes. Checkpoints are not Ray's (it gets numbers only); the run's lock is held
here, in the driver; a signal to the driver becomes the run's stop file; rank 0 prints into a file that the driver
shows.

The global batch is cut into as many slices as there are workers, so an elastic run sees the same samples at the same
step, whatever the count. Ray gives no warning before it resizes a group: what was trained since the last checkpoint
is lost, as after a death.

| | Ray by default | here |
|---|---|---|
| a worker is killed | found within 2 s | within 0.5 s |
| one is killed just after a checkpoint | the checkpoint is lost: it is registered at the next poll | nothing is lost |
| the newest checkpoint is truncated | taken, because only its existence is checked | the one before is taken |
| a worker is stopped (SIGSTOP) | found after 600 s | after `hang_seconds` |
| its training thread stalls | found by the others' collective, after 30 minutes | see `vaedist.distributed.liveness` |

The trainer below Ray's torch trainer is used: the latter would load torch in the driver and in the controller, and
choose a port long before it is bound. Ranks meet as under the local launcher (`Group.join`): rank 0 broadcasts its
address and the run's secret through Ray, and passes on a socket that listens already.

An error that a worker can name (`UserError`) is written to the work folder, raised by the driver, and not tried
again; so is a bug, with its traceback. After a death the group starts again, up to `max_failures` times, from the
last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vaedist.config.job import Job
from vaedist.config.settings import expand
from vaedist.core import errors
from vaedist.core.errors import UserError
from vaedist.distributed.liveness.silence import HANG_SECONDS
from vaedist.launchers.environment import temporary_environment
from vaedist.launchers.ray.cluster import ResourceRequest, cluster, nodes
from vaedist.launchers.ray.driver_log import DriverLog, as_user_error
from vaedist.launchers.ray.internals import ControllerThread, make_trainer
from vaedist.launchers.ray.train_worker import FAILURE_FILE, train_worker
from vaedist.runs.fit_options import FitOptions, Outcome
from vaedist.runs.run_folder import RunFolder
from vaedist.runs.run_lock import RunLock
from vaedist.runs.startup_timings import process_start_time
from vaedist.runs.stop_request import StopRequest, write_stop_file

_WORK = ".ray"
"""Folder inside the run folder for one attempt's console and errors, seen by the workers of every node."""

_LOOK_SECONDS = 0.25
_END_SECONDS = 15.0
_RESIZE_SECONDS = 10.0
"""How often an elastic group asks whether the cluster has changed; Ray itself looks at its nodes every 20 s."""

_PLACEMENT = {False: (600, 5), True: (15, 100)}
"""By whether the run is elastic: seconds to wait for free resources, and how often. Others may use them: a queue. An
elastic group is better asked again soon, because for 20 s Ray still counts on a node that has just gone."""


def run(
    job: Job,
    run_folder: Path,
    request: ResourceRequest,
    *,
    max_failures: int = 3,
    hang_seconds: float = HANG_SECONDS,
    options: FitOptions | None = None,
) -> Outcome:
    """Train with Ray workers.

    Args:
        job: The job.
        run_folder: Made if missing (0700); every node must see it.
        request: The workers and their resources.
        max_failures: How often Ray starts the group again after a worker died.
        hang_seconds: How long a worker may be silent, or keep others waiting while its training thread stands still,
            before it counts as lost; 0: for ever.
        options: What the command asked for; the token is filled in here, and the attempt where it has no name.

    Raises:
        UserError: what stopped the run, from whichever worker; or the cluster is too small.
    """
    options = options or FitOptions()
    _check_early(job, request)
    run_folder = run_folder.absolute()
    RunFolder.make(run_folder)
    # Ray installs a SIGTERM handler of its own when it starts: listen before, and again on top of it.
    with contextlib.ExitStack() as exits:
        early = exits.enter_context(StopRequest(None, ""))
        began = ("driver", process_start_time()), ("Ray", time.time())
        lock = exits.enter_context(RunLock.acquire(run_folder))
        connected = exits.enter_context(cluster(request))
        exits.enter_context(temporary_environment(_health_checks(request, hang_seconds)))
        gpus, workers = request.fit(nodes())
        late = exits.enter_context(StopRequest(None, ""))
        work = exits.enter_context(work_folder(run_folder))
        attempt = options.attempt or secrets.token_hex(4)
        options = replace(options, token=lock.token, attempt=attempt, engine="ray", hang_seconds=hang_seconds)
        options = options.with_startup(*began, ("Ray Train", time.time()))
        if not options.quiet:
            print(f"Ray {connected.description}: {request.describe(gpus, workers)}", flush=True)
        config = {
            "job": job.model_dump(mode="json"),
            "run_folder": str(run_folder),
            "folder": str(Path.cwd()),
            "work": str(work),
            "options": asdict(options),
            "cuda": gpus > 0,
            "threads": request.cpus,
        }
        trainer = _trainer(config, request, gpus, max_failures, work)
        thread = ControllerThread("ray-train", lambda: trainer.fit().return_value)
        exits.callback(_abort, thread, trainer)
        quiet, private = options.quiet, connected.private
        log = DriverLog(work, request, max_failures, hang_seconds, private=private, quiet=quiet)
        thread.start()
        stop_forwarded = False
        while not thread.wait(_LOOK_SECONDS):
            log.look()
            if not stop_forwarded and (early.requested or late.requested):
                stop_forwarded = True
                write_stop_file(run_folder, attempt)
        log.look()
        _raise_failure(work / FAILURE_FILE, log.world)
        if thread.error is not None:
            raise as_user_error(thread.error, log.world, log.stuck)
        return Outcome(**thread.result)


def _check_early(job: Job, request: ResourceRequest) -> None:
    """Find what would stop every worker before any is started: Ray needs many seconds for that.

    Raises:
        UserError: the data are not there, or there are more workers than samples in a batch.
    """
    from vaedist.data.format.index import Index

    Index.open(expand(job.data.path, "data.path"))
    if request.most > job.train.batch_size:
        raise UserError(
            f"--workers {request.most} is more than train.batch_size={job.train.batch_size}, so some would have "
            "nothing to do: start fewer workers, or use a larger batch"
        )


def _health_checks(request: ResourceRequest, hang_seconds: float) -> dict[str, str]:
    return {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also the least time between two reports
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(hang_seconds or 1e9),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_PLACEMENT[request.elastic][0]),
    }


@contextlib.contextmanager
def work_folder(run_folder: Path) -> Iterator[Path]:
    """A fresh private folder inside the run folder, removed with the attempt; the run's lock must be held."""
    folder = run_folder / _WORK
    shutil.rmtree(folder, ignore_errors=True)  # the lock is ours, so this is a dead attempt's
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _trainer(
    config: dict[str, Any], request: ResourceRequest, gpus: int, max_failures: int, work: Path
) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    return make_trainer(
        work / FAILURE_FILE,
        train_worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=(request.least, request.most) if request.elastic else request.most,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": request.reserved_cpus, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name="train",
            storage_path=str(work),
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=max_failures, controller_failure_limit=_PLACEMENT[request.elastic][1]
            ),
            callbacks=[_loss_reporter(work / "losses.jsonl")],
            worker_runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}},
        ),
    )


def _loss_reporter(file: Path) -> Any:
    """What Ray's controller runs when workers are lost: it writes a line to a file."""
    from ray.train import UserCallback

    path = str(file)

    # Made inside a function, so that it is pickled as a whole: on other people's clusters Ray's controller cannot
    # import this package.
    class LossReporter(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            import json

            def kinds(error: Exception) -> list[str]:
                inner = getattr(error, "health_check_failure", None)
                return [base.__name__ for kind in (error, inner) for base in type(kind).__mro__]

            lost = {str(rank): kinds(error) for rank, error in worker_exceptions.items()}
            with open(path, "a") as file:
                file.write(json.dumps({"lost": lost}) + "\n")

    return LossReporter()


def _abort(thread: ControllerThread, trainer: Any) -> None:
    """Where the run is left early (a second Ctrl-C), end Ray's controller, for which the thread waits.

    A thread that is inside Ray when Ray is shut down ends the whole process, before anything is reported or cleaned up.
    """
    if not thread.is_alive() or thread.wait(0):
        return
    import ray

    if trainer.controller is not None:
        with contextlib.suppress(ray.exceptions.RayError):  # its answer is that it has died
            ray.get(trainer.controller.abort.remote(), timeout=_END_SECONDS)
    thread.wait(_END_SECONDS)


def _raise_failure(file: Path, world: int) -> None:
    """Raise the error that a worker wrote, if one did."""
    if not file.exists():
        return
    failure = json.loads(file.read_bytes())
    if "bug" in failure:
        raise RuntimeError(f"rank {failure['rank']} of {world} failed\n{failure['bug']}")
    raise getattr(errors, failure["error"], UserError)(failure["text"])
