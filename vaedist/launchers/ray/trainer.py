"""Ray Train: the same loop in N Ray workers, on this machine or on a cluster that is already there.

Ray places the processes, starts the group again when one of them dies or falls silent, and, where the run is elastic
(`workers=(1, 4)`), when a node comes or goes. Everything else is ours: the checkpoints (Ray gets numbers, never a
checkpoint), the run's lock (held here, in the driver), stopping (a signal to the driver becomes the run's stop
file), the rendezvous, and the console: rank 0 prints into a file that the driver shows, so that the lines look as
they do under every other engine.

The global batch is cut into as many slices as there are workers, so an elastic run sees the same samples at the same
step, whatever the count. Ray gives no warning before it resizes a group: it costs what was trained since the last
checkpoint, as a death does.

What is seen of a lost worker, and what Ray does of its own accord (2.60, two workers, gloo; measured):

| | by default | here |
|---|---|---|
| a worker killed | found within 2 s | within 0.5 s |
| one killed just after a checkpoint | Ray loses that checkpoint: it is registered at the next poll | nothing is lost |
| newest checkpoint truncated | Ray takes it, for it only asks whether it is there | passed over for the one before |
| a worker stopped (SIGSTOP) | found after 600 s | after `hang_seconds` |
| its training thread stalls | found by the others' collective, after 30 minutes | see `vaedist.distributed.liveness` |

Ray's torch trainer is not used, only the trainer below it: it would load torch in the driver and in the controller,
which need none, and choose a port long before it is bound. Ranks meet as under the local engine (`Group.join`); rank 0
tells its address, and the secret that ranks ask of each other, through Ray's own broadcast and hands over a socket that
listens already.

An error that a worker can name (`UserError`) is written to the work folder, raised by the driver as it is, and not
tried again. Nor is a plain bug, which is shown with its traceback. A death is, up to `max_failures` times, from the
last committed checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from vaedist.config.job import Job
from vaedist.config.settings import expand
from vaedist.core import errors
from vaedist.core.errors import UserError
from vaedist.core.files import replace_file
from vaedist.distributed.liveness.silence import HANG_SECONDS
from vaedist.launchers.environment import temporary_environment
from vaedist.launchers.ray.cluster import ResourceRequest, cluster, nodes
from vaedist.launchers.ray.driver_log import BUGS, STUCK, DriverLog, named
from vaedist.runs.fit_options import FitOptions, Outcome
from vaedist.runs.run_folder import RunFolder
from vaedist.runs.run_lock import RunLock
from vaedist.runs.startup_timings import process_start_time
from vaedist.runs.stop_request import StopRequest, write_stop_file

_WORK = ".ray"
"""Folder inside the run folder for one attempt's console and errors, seen by the workers of every node."""

_FAILURE = "failure.json"
"""File in the work folder: the error that ended the run, if it has a name or is a bug."""

_LOOK_SECONDS = 0.25
_END_SECONDS = 15.0
_RESIZE_SECONDS = 10.0
"""How often an elastic group asks whether the cluster has changed; Ray itself looks at its nodes every 20 s."""

_PLACES = {False: (600, 5), True: (15, 100)}
"""By whether the run is elastic: seconds to wait for room, and how often. Room is taken by others: a queue. An elastic
group is better asked again soon, because for 20 s Ray still counts on a node that has just gone."""


def run(
    job: Job,
    run_folder: Path,
    *,
    workers: int | tuple[int, int] = 1,
    cpus_per_worker: int | None = None,
    gpus_per_worker: int | None = None,
    device: str = "auto",
    max_failures: int = 3,
    hang_seconds: float = HANG_SECONDS,
    options: FitOptions | None = None,
) -> Outcome:
    """Train with Ray workers.

    Args:
        job: The job.
        run_folder: Made if missing (0700); every node must see it.
        workers: Processes; or the least and the most, and the run follows the cluster in between.
        cpus_per_worker: CPUs that each reserves, and threads that it uses; None: one is reserved, and the workers of a
            node share its CPUs.
        gpus_per_worker: 0 or 1; None: 1 unless `device` is `cpu` or there are no GPUs.
        device: `auto`, `cpu` or `cuda`.
        max_failures: How often Ray starts the group again after a worker died.
        hang_seconds: How long a worker may be silent, or keep others waiting while its training thread stands still,
            before it counts as lost; 0: for ever.
        options: What the door asked for; the token is filled in here, and the attempt where it has no name.

    Raises:
        UserError: what stopped the run, from whichever worker; or the cluster is too small.
    """
    options = options or FitOptions()
    least, most = (workers, workers) if isinstance(workers, int) else workers
    request = ResourceRequest(least, most, cpus_per_worker or 1, gpus_per_worker, device)
    _early_mistakes(job, request)
    run_folder = run_folder.absolute()
    RunFolder.make(run_folder)
    knobs = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also the least time between two reports
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(hang_seconds or 1e9),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_PLACES[least < most][0]),
    }
    # Ray installs a SIGTERM handler of its own when it starts: listen before, and again on top of it.
    with contextlib.ExitStack() as exits:
        early = exits.enter_context(StopRequest(None, ""))
        began = ("driver", process_start_time()), ("Ray", time.time())
        lock = exits.enter_context(RunLock.acquire(run_folder))
        found = exits.enter_context(cluster(request))
        exits.enter_context(temporary_environment(knobs))
        gpus, room = request.fit(nodes())
        asked = exits.enter_context(StopRequest(None, ""))
        work = exits.enter_context(work_folder(run_folder))
        attempt = options.attempt or secrets.token_hex(4)
        options = replace(options, token=lock.token, attempt=attempt, engine="ray", hang_seconds=hang_seconds)
        if options.startup is not None:
            options = replace(options, startup=(*options.startup, *began, ("Ray Train", time.time())))
        if not options.quiet:
            kind = "one GPU" if gpus else "CPU" if request.cpus == 1 else f"{request.cpus} CPUs"
            count = str(least) if least == most else f"{least} to {most} ({room} now)"
            print(f"Ray {found.told}: {count} x {kind}", flush=True)
        orders = {
            "job": job.model_dump(mode="json"),
            "run_folder": str(run_folder),
            "folder": str(Path.cwd()),
            "work": str(work),
            "options": asdict(options),
            "cuda": gpus > 0,
            "threads": cpus_per_worker,
        }
        driving = _Driving(_trainer(orders, request, gpus, max_failures, work, private=found.private))
        exits.callback(driving.end)
        watch = DriverLog(
            work, request, max_failures, hang_seconds, private=found.private, quiet=options.quiet
        )
        driving.start()
        failure = work / _FAILURE
        passed_on = False
        while not driving.wait(_LOOK_SECONDS):
            watch.look()
            if not passed_on and (early.requested or asked.requested):
                passed_on = True
                write_stop_file(run_folder, attempt)
        watch.look()
        if failure.exists():
            told = json.loads(failure.read_bytes())
            if "bug" in told:
                raise RuntimeError(f"rank {told['rank']} of {watch.world} failed\n{told['bug']}")
            raise getattr(errors, told["error"], UserError)(told["text"])
        if driving.error is not None:
            raise named(driving.error, watch.world, watch.stuck)
        return Outcome(**driving.answer)


def _early_mistakes(job: Job, request: ResourceRequest) -> None:
    """What would stop every worker, told before any is started: Ray needs many seconds for that.

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


# The driver -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def work_folder(run_folder: Path) -> Iterator[Path]:
    """A fresh private folder inside the run folder, gone with the attempt; the run's lock must be held."""
    folder = run_folder / _WORK
    shutil.rmtree(folder, ignore_errors=True)  # the lock is ours: what lies there is a dead attempt's
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _trainer(
    orders: dict[str, Any],
    request: ResourceRequest,
    gpus: int,
    max_failures: int,
    work: Path,
    *,
    private: bool,
) -> Any:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api import data_parallel_trainer

    trainer: Any = data_parallel_trainer
    raylet: Any = ray._raylet

    # Ray gives each a process of its own, seconds of every start: one for Ray's data sets, of which we have none, and
    # one that tidies up should the controller die, which a cluster that ends with us does not need.
    needless = {"DatasetsCallback", *(["PlacementGroupCleanerCallback"] if private else [])}

    class Trainer(data_parallel_trainer.DataParallelTrainer):
        controller: Any = None

        def _create_default_callbacks(self) -> list[Any]:
            return [one for one in super()._create_default_callbacks() if type(one).__name__ not in needless]

        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            """Ray's own, but for the policy, and that the controller is kept, so that the run can be left."""
            settings["failure_policy"] = _policy(settings["failure_policy"], work / _FAILURE)
            told = {
                trainer.RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0",
                **trainer.get_env_vars_to_propagate(),
            }
            here = {raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
            remote = ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": told})
            self.controller = remote(trainer.TrainController).remote(**settings)
            ray.get(self.controller.run.remote())
            return ray.get(self.controller.get_result.remote())

    elastic = request.least < request.most
    return Trainer(
        _work,
        train_loop_config=orders,
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=(request.least, request.most) if elastic else request.most,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": request.cpus, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name="train",
            storage_path=str(work),
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=max_failures, controller_failure_limit=_PLACES[elastic][1]
            ),
            callbacks=[_reporter(work / "losses.jsonl")],
            worker_runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}},
        ),
    )


# The two classes below are made inside functions, so that they are sent as a whole: on a cluster of others Ray's
# controller cannot import us.


def _policy(of_ray: Any, failure: Path) -> Any:
    """Ray's own policy of trying again, but for an error that has a name, or a bug: every try would meet it."""
    place = str(failure)

    class Policy(type(of_ray)):  # type: ignore[misc]
        def make_decision(self, training_failed_error: Any) -> Any:
            import os

            from ray.train.v2._internal.execution.failure_handling import FailureDecision

            if os.path.exists(place):
                return FailureDecision.RAISE
            return super().make_decision(training_failed_error)

    return Policy(of_ray.failure_config)


def _reporter(path: Path) -> Any:
    """What Ray's controller runs when workers are lost: a line in a file."""
    from ray.train import UserCallback

    place = str(path)

    class Reporter(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            import json

            def kinds(error: Exception) -> list[str]:
                inner = getattr(error, "health_check_failure", None)
                return [one.__name__ for kind in (error, inner) for one in type(kind).__mro__]

            lost = {str(rank): kinds(error) for rank, error in worker_exceptions.items()}
            with open(place, "a") as file:
                file.write(json.dumps({"lost": lost}) + "\n")

    return Reporter()


class _Driving(threading.Thread):
    """Ray's controller, waited for beside the main thread, which stays free for signals and the console."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = trainer
        self._over = threading.Event()
        self.answer: dict[str, Any] = {}
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.answer = self._trainer.fit().return_value
        except Exception as error:  # noqa: BLE001 - handed to the main thread
            self.error = error
        finally:
            self._over.set()

    def wait(self, seconds: float) -> bool:
        """Whether it is over, at the latest after so long. A join that Ctrl-C interrupts calls a live thread dead
        (CPython 3.11)."""
        return self._over.wait(seconds)

    def end(self) -> None:
        """Where the run is left before its time (a second Ctrl-C), end Ray's controller, which this thread waits for:
        a thread that is inside Ray when Ray is shut down ends the whole process, with nothing told or tidied."""
        if not self.is_alive() or self.wait(0):
            return
        import ray

        if self._trainer.controller is not None:
            with contextlib.suppress(ray.exceptions.RayError):  # it answers by its end
                ray.get(self._trainer.controller.abort.remote(), timeout=_END_SECONDS)
        self.wait(_END_SECONDS)


# A worker ---------------------------------------------------------------------------------------------------


def _work(orders: dict[str, Any]) -> dict[str, Any] | None:
    """What each Ray worker runs: one rank of the loop. Its return value is the outcome."""
    import ray.train

    work = Path(orders["work"])
    failure = work / _FAILURE
    if failure.exists():
        return None  # a controller on another node may not have seen it yet, and tried again
    os.chdir(orders["folder"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    stages = work / "stages.jsonl"
    options = FitOptions(**orders["options"])
    if stages.exists():
        options = replace(options, startup=None)  # not the first group

    def reached(stage: str) -> None:
        if rank == 0:
            with stages.open("a") as file:
                file.write(json.dumps({"reached": stage, "world": world}) + "\n")

    def report(numbers: dict[str, float]) -> None:
        # Ray takes one report per poll of its controller: every log line would slow a fast model down.
        if any(name.startswith("validation/") for name in numbers):
            ray.train.report(numbers)

    def stuck(sentence: str) -> None:
        with (work / STUCK).open("a") as file:
            file.write(json.dumps({"rank": rank, "told": sentence}) + "\n")

    reached("started")
    begun = time.time()
    threads = orders["threads"] or _threads(context.get_local_world_size())
    os.environ["OMP_NUM_THREADS"] = str(threads)

    import torch

    from vaedist.distributed.process_group import Group
    from vaedist.training.loop import fit

    reached("imported")
    if options.startup is not None:
        here = ("imports", begun), ("rendezvous", time.time())
        options = replace(options, startup=(*options.startup, *here))
    with contextlib.ExitStack() as exits:
        if rank == 0:
            console: TextIO = exits.enter_context((work / "console.txt").open("a", buffering=1))
            exits.enter_context(contextlib.redirect_stdout(console))
            exits.enter_context(contextlib.redirect_stderr(console))
        # Ray has put its own handlers on the root logger; ours speak plainly, as under every other engine.
        logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
        logging.getLogger("ray.train").setLevel(logging.WARNING)
        try:
            _meet(rank, world)
            # Ray shows each worker the one GPU that is its own.
            group = Group.join(torch.device("cuda", 0) if orders["cuda"] else "cpu")
            exits.callback(group.close)
            reached("joined")
            outcome = fit(
                Job.model_validate(orders["job"]),
                Path(orders["run_folder"]),
                group=group,
                report=report,
                options=replace(options, threads=threads),
                reached=reached,
                stuck=stuck,
            )
        except (UserError, *BUGS) as error:
            if not failure.exists():
                what = (
                    {"error": type(error).__name__, "text": str(error)}
                    if isinstance(error, UserError)
                    else {"bug": traceback.format_exc()}
                )
                replace_file(failure, json.dumps({**what, "rank": rank, "at": time.time()}).encode())
            raise
        return asdict(outcome)


def _meet(rank: int, world: int) -> None:
    """Set what `Group.join` looks for. Rank 0 listens before it tells where, so nobody can take the port between."""
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    place = None
    if rank == 0 and world > 1:
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        listener = socket.create_server((address, 0), backlog=2 * world + 8)
        place = [address, listener.getsockname()[1], secrets.token_hex(32)]
        os.environ["VAEDIST_STORE_FD"] = str(listener.detach())
    if world > 1:
        address, port, secret = broadcast_from_rank_zero(place)
        os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), "VAEDIST_STORE_SECRET": secret}
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }


def _threads(local_world: int) -> int:
    """A worker's share of its node's CPUs, as Ray knows them: those of the allocation, where we started Ray."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    (offered,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == here)  # type: ignore[no-untyped-call]
    return max(1, int(offered.get("CPU", 1)) // local_world)
