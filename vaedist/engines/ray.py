"""Ray Train: the same loop in N Ray workers, on this machine or on a cluster that is already there.

Ray starts the processes, forms the torch group and starts it again when a worker dies. Everything else is ours:
the checkpoints (Ray gets numbers, never a checkpoint), the run's lock (held here, in the driver), stopping (a
signal to the driver becomes the run's stop file), and the console: rank 0 prints into a file that the driver
shows, so that the lines look as they do under every other engine.

Unless Ray is already initialised, a private cluster is started: with the allocation's CPUs rather than the
machine's, no dashboard, a small object store (images never pass through it), a short temporary folder (unix
sockets allow 107 bytes) and a token of its own in a 0600 file. It never joins a cluster that it merely finds
(RAY_ADDRESS), and it ends with this process.

An error that a worker can name (`UserError`) is written to the work folder, raised by the driver as it is, and
not tried again; a death is, up to `max_failures` times, from the last committed checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from vaedist import errors
from vaedist.config import Job
from vaedist.engines.local import loopback, python_path
from vaedist.errors import UserError, WorkerLost
from vaedist.files import replace_file
from vaedist.training import stop
from vaedist.training.attempt import FitOptions, Outcome
from vaedist.training.folder import RunFolder
from vaedist.training.lock import RunLock

OBJECT_STORE_BYTES = 256 << 20
_WORK = ".ray"
"""Folder inside the run folder for one attempt's console and errors, seen by the workers of every node."""

_KNOBS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also the least time between two reports
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",  # a stopped worker: Ray would wait 10 minutes
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",  # importing torch from a busy network disk
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a job mean the same as everywhere
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # training is what this machine is for; Ray would run it at nice 15
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def run(
    job: Job,
    run_folder: Path,
    *,
    workers: int = 1,
    gpus_per_worker: int | None = None,
    device: str = "auto",
    max_failures: int = 3,
    options: FitOptions | None = None,
) -> Outcome:
    """Train with `workers` Ray workers.

    Args:
        job: The job.
        run_folder: Made if missing (0700); every node must see it.
        workers: Processes, one CPU each.
        gpus_per_worker: 0 or 1; None: 1 unless `device` is `cpu` or there are no GPUs.
        device: `auto`, `cpu` or `cuda`.
        max_failures: How often Ray starts the group again after a worker died.
        options: What the door asked for; token and attempt are filled in here.

    Raises:
        UserError: what stopped the run, from whichever worker; or the cluster is too small.
    """
    options = options or FitOptions()
    run_folder = run_folder.absolute()
    RunFolder.make(run_folder)
    # Ray installs a SIGTERM handler of its own when it starts: listen before, and again on top of it.
    with contextlib.ExitStack() as exits:
        early = exits.enter_context(stop.StopRequest(None, ""))
        lock = exits.enter_context(RunLock.acquire(run_folder))
        private = exits.enter_context(cluster(workers, gpus_per_worker, device))
        gpus = _fit_into(_offered(), workers, gpus_per_worker, device)
        asked = exits.enter_context(stop.StopRequest(None, ""))
        work = exits.enter_context(_work_folder(run_folder))
        attempt = secrets.token_hex(4)
        options = replace(options, token=lock.token, attempt=attempt, engine="ray")
        if not options.quiet:
            kind = "one GPU" if gpus else "CPU"
            print(f"Ray {'started on this machine' if private else 'found'}: {workers} x {kind}", flush=True)
        orders = {
            "job": job.model_dump(mode="json"),
            "run_folder": str(run_folder),
            "folder": str(Path.cwd()),
            "work": str(work),
            "options": asdict(options),
            "cuda": gpus > 0,
        }
        trainer = _trainer(orders, workers, gpus, max_failures, work)
        driving = _Driving(trainer)
        driving.start()
        console = _Console(work / "console.txt")
        failure = work / "failure.json"
        passed_on = False
        while driving.is_alive():
            driving.join(0.5)
            console.show()
            if not passed_on and (early.requested or asked.requested):
                passed_on = True
                stop.ask(run_folder, attempt)
            if private and failure.exists():
                break  # a named error: no use in waiting for Ray to try again
        console.show()
        if failure.exists():
            told = json.loads(failure.read_bytes())
            raise getattr(errors, told["error"], UserError)(told["text"])
        if driving.error is not None:
            raise _named(driving.error, workers)
        return Outcome(**driving.answer)


# The cluster ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster(
    workers: int = 0, gpus_per_worker: int | None = None, device: str = "auto", cpus: int | None = None
) -> Iterator[bool]:
    """A private Ray cluster on this machine, ended on exit; or, where Ray is initialised already, that one.

    Yields:
        Whether it is a private one.

    Raises:
        UserError: it would be too small for so many workers; nothing has been started then.
    """
    # Ray reads this once, when it is first loaded; a Ray that is loaded already turns tokens on by itself.
    tokens = {} if "ray" in sys.modules else {"RAY_AUTH_MODE": "token"}
    with _environment(_KNOBS | tokens | {"PYTHONPATH": python_path()}):
        import ray

        if ray.is_initialized():
            yield False
            return
        import torch

        size = {
            "CPU": float(cpus or len(os.sched_getaffinity(0))),
            "GPU": float(torch.cuda.device_count() if device != "cpu" else 0),
        }
        _fit_into(size, workers, gpus_per_worker, device)
        with _environment(loopback()), contextlib.ExitStack() as exits:
            for last_try in (False, True):  # a machine under heavy load can miss Ray's 30 seconds
                folder = exits.enter_context(_temporary())
                exits.enter_context(_token(folder))
                exits.callback(ray.shutdown)
                try:
                    ray.init(
                        address="local",
                        num_cpus=int(size["CPU"]),
                        num_gpus=int(size["GPU"]),
                        object_store_memory=OBJECT_STORE_BYTES,
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        _temp_dir=str(folder / "r"),  # Ray opens its own folder to everybody; ours stays 0700
                    )
                    break
                except Exception as error:  # noqa: BLE001 - Ray raises all kinds, Exception itself too
                    exits.close()
                    if last_try:
                        reason = " ".join(str(error).split())[:300]
                        raise UserError(
                            f"Ray did not start on this machine ({reason}): look at the machine's load and memory, or "
                            "train with --engine local"
                        ) from None
            yield True


def _offered() -> dict[str, float]:
    """What the whole cluster offers."""
    import ray

    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]


def _fit_into(size: dict[str, float], workers: int, gpus_per_worker: int | None, device: str) -> int:
    """GPUs per worker.

    Raises:
        UserError: the cluster can never hold the workers; Ray itself would wait for ever.
    """
    cpus, gpus = int(size.get("CPU", 0)), int(size.get("GPU", 0))
    if device == "cpu":
        if gpus_per_worker:
            raise UserError("--gpus-per-worker 1 has no effect with --device cpu: leave one of them out")
        wanted = 0
    elif gpus_per_worker is None:
        wanted = 1 if device == "cuda" or gpus else 0
    elif device == "cuda" and not gpus_per_worker:
        raise UserError("--device cuda needs a GPU per worker: leave --gpus-per-worker 0 out")
    else:
        wanted = gpus_per_worker
    if workers * wanted > gpus:
        raise UserError(
            f"{workers} workers with one GPU each need {workers * wanted} GPUs, but Ray has {gpus} here: start at most "
            f"{gpus} workers, ask the allocation for more, or use --device cpu"
            if gpus
            else "Ray sees no GPU here: use --device cpu, or ask the allocation for GPUs"
        )
    if workers > cpus:
        raise UserError(
            f"{workers} workers need {workers} CPUs, but Ray has {cpus} here: start at most {cpus} workers, or ask "
            "the allocation for more"
        )
    return wanted


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for a while: what Ray's processes inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@functools.cache
def _secret() -> str:
    # One per process: Ray caches the first token that it reads.
    return secrets.token_hex(32)


@contextlib.contextmanager
def _token(folder: Path) -> Iterator[None]:
    """A token of the cluster's own, in a file that only this user can read; never in argv, environment or logs."""
    path = folder / "token"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(_secret())
    inherited = os.environ.pop("RAY_AUTH_TOKEN", None)  # it would win over the file
    try:
        with _environment({"RAY_AUTH_TOKEN_PATH": str(path)}):
            yield
    finally:
        if inherited is not None:
            os.environ["RAY_AUTH_TOKEN"] = inherited


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    """A short private folder; those that killed processes left behind are swept first.

    Its owner holds a `flock` on it, which the kernel drops however the owner ends.
    """
    places = [tempfile.gettempdir(), "/tmp", "/var/tmp"]  # noqa: S108 - the folder in it is fresh and 0700
    # Ray adds up to 64 bytes to the name, and 107 is the limit.
    place = Path(next((one for one in places if len(one) <= 20 and os.access(one, os.W_OK)), places[0]))
    prefix = f"vd-{os.getuid()}-"
    for old in place.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), _held(old):
            _clear(old)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    if len(str(folder)) > 41:
        folder.rmdir()
        raise UserError(f"{place} is too long a path for Ray's sockets: set TMPDIR to a short local folder")
    try:
        with _held(folder):
            yield folder
    finally:
        _clear(folder)


def _clear(folder: Path) -> None:
    """Kill the Ray processes that were started in `folder` and still live, and remove it.

    They name it on their command line. A driver that was killed leaves some, and so does a start that failed.
    """
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (process / "cmdline").read_bytes() and (
                process.stat().st_uid == os.getuid() and int(process.name) != os.getpid()
            ):
                os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


# The driver -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _work_folder(run_folder: Path) -> Iterator[Path]:
    folder = run_folder / _WORK
    shutil.rmtree(folder, ignore_errors=True)  # the lock is ours: what lies there is a dead attempt's
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _trainer(orders: dict[str, Any], workers: int, gpus: int, max_failures: int, work: Path) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        _work,  # type: ignore[arg-type]
        train_loop_config=orders,
        torch_config=TorchConfig(timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name="train",
            storage_path=str(work),
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=max_failures, controller_failure_limit=3
            ),
            worker_runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}},
        ),
    )


class _Driving(threading.Thread):
    """Ray's controller, waited for beside the main thread, which stays free for signals and the console."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = trainer
        self.answer: dict[str, Any] = {}
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.answer = self._trainer.fit().return_value
        except Exception as error:  # noqa: BLE001 - handed to the main thread
            self.error = error


class _Console:
    """Shows what rank 0 has printed since the last look."""

    def __init__(self, path: Path) -> None:
        self._path, self._shown = path, 0

    def show(self) -> None:
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._shown)
            text = file.read()
            self._shown += len(text)
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()


def _named(error: Exception, workers: int) -> Exception:
    """Ray's error as ours: a dead worker is the user's to know, anything else is a bug with its traceback."""
    from ray.exceptions import RayActorError

    for rank, failure in sorted(getattr(error, "worker_failures", {}).items()):
        if isinstance(getattr(failure, "health_check_failure", failure), RayActorError):
            return WorkerLost(
                f"rank {rank} of {workers} died (killed, or out of memory), and the allowed failures are used up; "
                "the same command continues from the last checkpoint"
            )
    return RuntimeError(f"Ray Train failed\n{error}")


# A worker ---------------------------------------------------------------------------------------------------


def _work(orders: dict[str, Any]) -> dict[str, Any] | None:
    """What each Ray worker runs: one rank of the loop. Its return value is the outcome."""
    import ray.train
    import ray.train.torch

    from vaedist.training.dist import Group
    from vaedist.training.loop import fit

    work = Path(orders["work"])
    failure = work / "failure.json"
    if failure.exists():
        return None  # Ray tries once more after an error that has a name: the driver is about to tell it
    os.chdir(orders["folder"])
    rank = ray.train.get_context().get_world_rank()

    def report(numbers: dict[str, float]) -> None:
        # Ray takes one report per poll of its controller: every log line would slow a fast model down.
        if any(name.startswith("validation/") for name in numbers):
            ray.train.report(numbers)

    with contextlib.ExitStack() as exits:
        if rank == 0:
            console: TextIO = exits.enter_context((work / "console.txt").open("a", buffering=1))
            exits.enter_context(contextlib.redirect_stdout(console))
            exits.enter_context(contextlib.redirect_stderr(console))
        # Ray has put its own handlers on the root logger; ours speak plainly, as under every other engine.
        logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
        logging.getLogger("ray.train").setLevel(logging.WARNING)
        device = ray.train.torch.get_device() if orders["cuda"] else "cpu"
        try:
            outcome = fit(
                Job.model_validate(orders["job"]),
                Path(orders["run_folder"]),
                group=Group.join(device),
                report=report,
                options=FitOptions(**orders["options"]),
            )
        except UserError as error:
            if not failure.exists():
                told = {"error": type(error).__name__, "text": str(error), "rank": rank, "at": time.time()}
                replace_file(failure, json.dumps(told).encode())
            raise
        return asdict(outcome)
