"""Ray Tune: the trials of a search, several at a time, on this machine or on a cluster that is already there.

Tune starts trials, keeps as many running as the allocation holds, starts a trial whose process died again, and
carries numbers from trials to the driver. What must not be lost is ours, in `trials.jsonl`
(`vaedist.tuning.trial_log`): Tune's own snapshot lies in a work folder that is thrown away. So a search that was
killed is not restored; it is begun again, with the trials that have ended known and the others where their run
folders have them. Ours, too, is to find out that a process has stopped (`vaedist.launchers.ray.heartbeat`) or that
its training thread stands still (`vaedist.distributed.liveness`): it is ended, and Tune counts a death.

A trial is an ordinary run (`vaedist.tuning.trial_run`): one worker trains inside Tune's own process, several are a Ray
Train job of their own. Tune never kills one: a trial that is behind, or a search that is to stop, is asked through the
run's stop file, as every run is, so that it saves, gives its lock back, and leaves no placement group behind that would
starve the next one (ray#54305).

How many run at a time is counted from what Ray has, which `vaedist.launchers.ray.cluster` takes from the allocation: as
many as fit with all their workers. Tune's own process of a trial with several workers only waits, and asks for no CPU.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vaedist.config.job import Job
from vaedist.core.errors import UserError
from vaedist.data.format.index import Index
from vaedist.distributed.liveness.silence import HANG_SECONDS
from vaedist.launchers.environment import temporary_environment
from vaedist.launchers.ray import trainer as trains
from vaedist.launchers.ray.cluster import ResourceRequest, cluster, nodes
from vaedist.launchers.ray.heartbeat import HeartbeatMonitor, heartbeat_file, record_death
from vaedist.runs.fit_options import FitOptions, Outcome
from vaedist.runs.run_lock import RunLock
from vaedist.runs.stop_request import StopRequest
from vaedist.training.run_log import read_metrics
from vaedist.tuning.controller import SearchController
from vaedist.tuning.space import Space

_KNOBS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs log for themselves
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # Tune's snapshot, of which we have no use
    "TUNE_WARN_THRESHOLD_S": "30",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_HEAD = "node:__internal_head__"
_HARDLY_ANY = 0.001
"""Of a resource that a process asks for only to be placed."""
_ANY_NUMBER = 1_000_000
_POLL_SECONDS = 0.5


def run(
    space: Space,
    folder: Path,
    index: Index,
    *,
    workers: int = 1,
    concurrent: int | None = None,
    device: str = "auto",
    max_failures: int = 3,
    hang_seconds: float = HANG_SECONDS,
    tell: Callable[[str], None] = print,
    detail: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda _, __: None,
    command: tuple[str, ...] = (),
) -> SearchController:
    """Search through `space` in `folder`, from where it stands, to its end or until asked to stop.

    Args:
        space: What to search.
        folder: Made by the caller (0700); every node must see it.
        index: The data.
        workers: Of each trial.
        concurrent: Trials at a time; None: as many as fit.
        device: `auto`, `cpu` or `cuda`.
        max_failures: How often a trial whose process died is started again.
        hang_seconds: How long the process of a trial may be silent; four times as long its training thread may stand
            still. 0: for ever.
        tell: Shows one line.
        detail: Shows what a validation of a trial found, in one line.
        progress: Told how many trials have ended, of how many.
        command: The command line, for the record of each run.

    Returns:
        The search, with `stopping` where it was asked to stop.

    Raises:
        UserError: what stopped it; the same command continues.
    """
    folder = folder.absolute()
    # Ray installs a SIGTERM handler of its own when it starts: listen before, and again on top of it.
    with contextlib.ExitStack() as exits:
        early = exits.enter_context(StopRequest(None, ""))
        exits.enter_context(RunLock.acquire(folder))
        sweep = SearchController.open(folder, space, index, tell)
        if not sweep.left:
            return sweep
        exits.enter_context(temporary_environment(_KNOBS))
        request = ResourceRequest(workers, _ANY_NUMBER, space.resources.cpus, space.resources.gpus, device)
        try:
            found = exits.enter_context(cluster(request))
            gpus, room = request.fit(nodes())
            slots = at_once(room, workers, concurrent)
        except UserError:
            sweep.record.discard()
            raise
        asked = exits.enter_context(StopRequest(None, ""))
        work = exits.enter_context(trains.work_folder(folder))
        orders = {
            "search": str(folder),
            "folder": str(Path.cwd()),
            "data": str(Path(index.folder).absolute()),
            "workers": workers,
            "cpus": space.resources.cpus,
            "gpus": gpus,
            "max_failures": max_failures,
            "hang_seconds": hang_seconds,
            "command": list(command),
        }
        (work / "orders.json").write_text(json.dumps(orders))
        tell(
            f"Ray {found.told}: {slots} trial{'s' * (slots > 1)} at a time, "
            f"{workers} worker{'s' * (workers > 1)} each, {'one GPU' if gpus else 'CPU'}"
        )
        heartbeats = HeartbeatMonitor(work, hang_seconds)

        def ended() -> None:
            progress(sum(trial.ended for trial in sweep.record.trials), sweep.space.trials)

        ended()
        tuner = _tuner(sweep, work, workers, gpus, slots, max_failures, heartbeats, detail, ended)
        _drive(sweep, tuner, heartbeats, early, asked)
        if sweep.error is not None:
            raise sweep.error
        return sweep


def at_once(room: int, workers: int, wanted: int | None) -> int:
    """How many trials run at a time, each with all its workers.

    Args:
        room: Workers for which the cluster has room.
        workers: Of a trial; at most `room`.
        wanted: At most so many; None: all that fit.

    Raises:
        UserError: fewer fit than are wanted.
    """
    most = room // workers
    if wanted is not None and wanted > most:
        raise UserError(
            f"--max-parallel {wanted}: {wanted} trials at a time have {wanted * workers} workers, but there is room "
            f"for {room} here: at most {most} trials fit; ask the allocation for more"
        )
    return wanted or most


# The driver -------------------------------------------------------------------------------------------------


def _tuner(
    sweep: SearchController,
    work: Path,
    workers: int,
    gpus: int,
    slots: int,
    max_failures: int,
    heartbeats: HeartbeatMonitor,
    detail: Callable[[str], None],
    ended: Callable[[], None],
) -> Any:
    from ray import tune
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler
    from ray.tune.search import Searcher

    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a death is told below, in one line
    numbers: dict[str, int] = {}  # Tune's name of a trial to ours

    class Proposals(Searcher):
        """The next trial, and the news of its end."""

        def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
            return True

        def suggest(self, trial_id: str) -> Any:
            trial = sweep.next_trial()
            if trial is None:
                return Searcher.FINISHED
            numbers[trial_id] = trial.number
            return {"trial": trial.number, "work": str(work)}

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            answer = None if error or not result or "answer" not in result else json.loads(result["answer"])
            sweep.on_trial_end(numbers[trial_id], answer)
            ended()

        def save(self, checkpoint_path: str) -> None:
            """Nothing: the record is the truth."""

        def __reduce__(self) -> tuple[Any, ...]:
            return (Searcher, ())  # Tune keeps a copy of its settings beside its snapshot

    class Rungs(FIFOScheduler):
        """Each trial in turn; one that is behind at a rung is asked to stop."""

        def __reduce__(self) -> tuple[Any, ...]:
            return (FIFOScheduler, ())

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            number = numbers[trial.trial_id]
            if "numbers" in result:
                found = json.loads(result["numbers"])
                shown = "  ".join(f"{name} {value:.5g}" for name, value in found.items() if value is not None)
                detail(f"trial {number}  step {result['step']}  {shown}")
                if sweep.on_validation(number, result["step"], found):
                    sweep.request_stop(number)
            goes_on: str = TrialScheduler.CONTINUE
            return goes_on

    class Deaths(tune.Callback):
        """A line for each process that died and starts again."""

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            number = numbers[trial.trial_id]
            sweep.echo(f"trial {number}: {heartbeats.death(number)}; it goes on from its last checkpoint")

        def __reduce__(self) -> tuple[Any, ...]:
            return (tune.Callback, ())

    cpus = sweep.space.resources.cpus
    resources: dict[str, int | float] = {"CPU": cpus, "GPU": gpus} if workers == 1 else {_HEAD: _HARDLY_ANY}
    return tune.Tuner(
        tune.with_resources(_trial, tune.PlacementGroupFactory([resources])),
        tune_config=tune.TuneConfig(
            search_alg=Proposals(),
            scheduler=Rungs(),  # type: ignore[no-untyped-call]
            num_samples=sweep.left,
            max_concurrent_trials=slots,
            reuse_actors=True,  # libraries are loaded once, not once per trial
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(work),
            failure_config=tune.FailureConfig(max_failures=max_failures),
            callbacks=[Deaths()],
            verbose=0,
        ),
    )


def _name(trial: Any) -> str:
    return f"{trial.config['trial']:03d}"


class _Driving(threading.Thread):
    """Tune's controller, beside the main thread, which stays free for signals."""

    def __init__(self, tuner: Any) -> None:
        super().__init__(name="ray-tune", daemon=True)
        self._tuner = tuner
        self.over = threading.Event()  # a join that Ctrl-C interrupts calls a live thread dead (CPython 3.11)
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._tuner.fit()
        except Exception as error:  # noqa: BLE001 - handed to the main thread
            self.error = error
        finally:
            self.over.set()


def _drive(
    sweep: SearchController,
    tuner: Any,
    heartbeats: HeartbeatMonitor,
    early: StopRequest,
    asked: StopRequest,
) -> None:
    driving = _Driving(tuner)
    driving.start()
    while not driving.over.wait(_POLL_SECONDS):
        heartbeats.look(list(sweep.running))
        if early.requested or asked.requested:
            sweep.stop_all()
        if sweep.stopping:
            for number in list(sweep.running):
                sweep.request_stop(number)  # again and again: one may only now have come to look
    if driving.error is not None and sweep.error is None:
        raise RuntimeError(f"Ray Tune failed\n{driving.error}") from driving.error
    if not (sweep.stopping or sweep.complete):
        raise RuntimeError("Ray Tune came to an end with trials left")


# A trial ----------------------------------------------------------------------------------------------------


def _trial(config: dict[str, Any]) -> dict[str, Any]:
    """What Tune runs: one trial, from its record to its numbers."""
    from ray import tune

    from vaedist.distributed.liveness.stalls import StallMonitor
    from vaedist.tuning.trial_log import run_folder
    from vaedist.tuning.trial_run import run_trial

    orders = json.loads((Path(config["work"]) / "orders.json").read_text())
    os.chdir(orders["folder"])
    work, number, monitor = Path(config["work"]), config["trial"], StallMonitor()
    device = "cuda" if orders["gpus"] else "cpu"
    options = FitOptions(quiet=True, engine="ray tune", command=tuple(orders["command"]))

    def report(numbers: dict[str, float]) -> None:
        found = {
            name.removeprefix("validation/"): value
            for name, value in numbers.items()
            if name.startswith("validation/")
        }
        if found:
            tune.report({"step": int(numbers["step"]), "numbers": json.dumps(found)})

    def alone(job: Job, place: Path) -> Outcome:
        from vaedist.distributed.process_group import Group
        from vaedist.training.loop import fit

        group = Group.join(device, stall_monitor=monitor)
        try:
            return fit(job, place, group=group, report=report, options=options)
        finally:
            group.close()

    def together(job: Job, place: Path) -> Outcome:
        told: list[Outcome | BaseException] = []

        def work() -> None:
            try:
                told.append(
                    trains.run(
                        job,
                        place,
                        workers=orders["workers"],
                        cpus_per_worker=orders["cpus"],
                        gpus_per_worker=orders["gpus"],
                        device=device,
                        max_failures=orders["max_failures"],
                        hang_seconds=orders["hang_seconds"],
                        options=options,
                    )
                )
            except BaseException as error:  # noqa: BLE001 - raised again below
                told.append(error)

        training = threading.Thread(target=work, name="ray-train", daemon=True)
        training.start()
        heard = -1
        while training.is_alive():
            training.join(_POLL_SECONDS)
            # Ray Train's own workers report to Ray Train; here the run's log is read, which has every number.
            for row in read_metrics(place / "metrics.jsonl"):
                if row["kind"] == "validate" and row["step"] > heard:
                    heard = row["step"]
                    numbers = {name: value for name, value in row.items() if isinstance(value, float | int)}
                    report(
                        {"step": heard, **{f"validation/{name}": value for name, value in numbers.items()}}
                    )
        if isinstance(told[0], BaseException):
            raise told[0]
        return told[0]

    try:
        search = Path(orders["search"])
        watched = monitor.watched(
            orders["hang_seconds"],
            run_folder(search, number),
            partial(record_death, work, number),
            who="its process",
        )
        with heartbeat_file(work, number), watched:
            training = alone if orders["workers"] == 1 else together
            answer = run_trial(search, number, orders["data"], training, device=device)
    except Exception:  # noqa: BLE001 - a bug: the driver shows it, and Tune need not try again
        answer = {"status": "error", "error": "RuntimeError", "text": traceback.format_exc()}
    return {"answer": json.dumps(answer), "at": time.time()}
