"""Ray Tune: the trials of a search, several at a time, on this machine or on a cluster that is already there.

Tune starts trials, keeps as many running as the allocation holds, starts a trial whose process died again, and
carries numbers from trials to the driver. The record of the search is ours (`trials.jsonl`,
`vaedist.tuning.trial_log`): Tune's own snapshot lies in a work folder that is removed. A killed search is therefore
not restored by Tune but started again; trials that have ended are in the record, and the others continue from their
run folders. Processes that are stopped (`vaedist.launchers.ray.heartbeat`) or whose training thread stalls
(`vaedist.distributed.liveness`) are ended by us, and Tune counts a death.

A trial is an ordinary run (`vaedist.tuning.trial_run`). Tune never kills one: a trial that is behind, or a search
that is to stop, writes the run's stop file, so that the run saves, releases its lock, and leaves no placement group
behind that would starve the next one (ray#54305).

As many trials run at a time as fit with all their workers into what Ray has. Tune's own process of a trial with
several workers only waits, and reserves no CPU.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vaedist.core.errors import UserError
from vaedist.data.format.index import Index
from vaedist.distributed.liveness.silence import HANG_SECONDS
from vaedist.launchers.environment import temporary_environment
from vaedist.launchers.ray.cluster import ResourceRequest, cluster, nodes
from vaedist.launchers.ray.heartbeat import HeartbeatMonitor
from vaedist.launchers.ray.internals import ControllerThread, supported_ray
from vaedist.launchers.ray.trainer import work_folder
from vaedist.launchers.ray.tune_worker import CONFIG_FILE, tune_worker
from vaedist.runs.run_lock import RunLock
from vaedist.runs.stop_request import StopRequest
from vaedist.tuning.controller import SearchController
from vaedist.tuning.space import Space

_TUNE_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs log for themselves
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # Tune's snapshot, of which we have no use
    "TUNE_WARN_THRESHOLD_S": "30",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_PLACED_ON_HEAD = {"node:__internal_head__": 0.001}
"""Resources of a process that only waits."""
_ANY_NUMBER = 1_000_000
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class TuneOptions:
    """How the trials of a search run.

    Attributes:
        workers: Of each trial.
        max_parallel: Trials at a time; None: as many as fit.
        device: `auto`, `cpu` or `cuda`.
        max_failures: How often a trial whose process died is started again.
        hang_seconds: How long the process of a trial may be silent; four times as long its training thread may stand
            still. 0: for ever.
        command: The command line, for the record of each run.
    """

    workers: int = 1
    max_parallel: int | None = None
    device: str = "auto"
    max_failures: int = 3
    hang_seconds: float = HANG_SECONDS
    command: tuple[str, ...] = ()


def run(
    space: Space,
    folder: Path,
    index: Index,
    options: TuneOptions,
    *,
    echo: Callable[[str], None] = print,
    detail: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> SearchController:
    """Search through `space` in `folder`, from where it stands, to its end or until asked to stop.

    Args:
        space: What to search.
        folder: Made by the caller (0700); every node must see it.
        index: The data.
        options: How the trials run.
        echo: Shows one line.
        detail: Shows the numbers of a trial's validation, in one line.
        progress: Takes how many trials have ended, of how many.

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
        search = SearchController.open(folder, space, index, echo)
        if not search.left:
            return search
        exits.enter_context(temporary_environment(_TUNE_ENV))
        each, workers = space.resources, options.workers
        request = ResourceRequest(workers, _ANY_NUMBER, each.cpus, each.gpus, options.device)
        try:
            connected = exits.enter_context(cluster(request))
            gpus, room = request.fit(nodes())
            parallel = parallel_trials(room, workers, options.max_parallel)
        except UserError:
            search.record.discard()
            raise
        late = exits.enter_context(StopRequest(None, ""))
        work = exits.enter_context(work_folder(folder))
        config = {
            "search": str(folder),
            "folder": str(Path.cwd()),
            "data": str(Path(index.folder).absolute()),
            "cpus": each.cpus,
            "gpus": gpus,
            **asdict(options),
        }
        (work / CONFIG_FILE).write_text(json.dumps(config))
        echo(
            f"Ray {connected.description}: {parallel} trial{'s' * (parallel > 1)} at a time, "
            f"{workers} worker{'s' * (workers > 1)} each, {'one GPU' if gpus else 'CPU'}"
        )
        heartbeats = HeartbeatMonitor(work, options.hang_seconds)
        hooks = _Hooks(search, work, heartbeats, detail, progress)
        hooks.report_progress()
        resources = {"CPU": each.cpus, "GPU": gpus} if workers == 1 else _PLACED_ON_HEAD
        with supported_ray():
            tuner = _tuner(hooks, resources, parallel, options.max_failures)
        _drive(search, tuner, heartbeats, lambda: early.requested or late.requested)
        if search.error is not None:
            raise search.error
        return search


def parallel_trials(room: int, workers: int, wanted: int | None) -> int:
    """How many trials run at a time, each with all its workers.

    Args:
        room: Workers that fit into the cluster.
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


# Tune's hooks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Hooks:
    """What Tune's hooks need of the search. Each hook is pickled as its base class, because Tune keeps a copy of its
    settings beside its snapshot."""

    search: SearchController
    work: Path
    heartbeats: HeartbeatMonitor
    detail: Callable[[str], None]
    progress: Callable[[int, int], None]
    numbers: dict[str, int] = field(default_factory=dict)  # of the trials, by Tune's names

    def report_progress(self) -> None:
        ended = sum(trial.ended for trial in self.search.record.trials)
        self.progress(ended, self.search.space.trials)

    def searcher(self) -> Any:
        """Gives Tune the next trial, and takes the result of each."""
        from ray.tune.search import Searcher

        hooks = self

        class Proposals(Searcher):
            def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
                return True

            def suggest(self, trial_id: str) -> Any:
                trial = hooks.search.next_trial()
                if trial is None:
                    return Searcher.FINISHED
                hooks.numbers[trial_id] = trial.number
                return {"trial": trial.number, "work": str(hooks.work)}

            def on_trial_complete(
                self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
            ) -> None:
                answer = (
                    None if error or not result or "answer" not in result else json.loads(result["answer"])
                )
                hooks.search.on_trial_end(hooks.numbers[trial_id], answer)
                hooks.report_progress()

            def save(self, checkpoint_path: str) -> None:
                """Nothing: the record of the search is `trials.jsonl`."""

            def __reduce__(self) -> tuple[Any, ...]:
                return (Searcher, ())

        return Proposals()

    def scheduler(self) -> Any:
        """Starts trials in turn; one that is behind at a rung is asked to stop."""
        from ray.tune.schedulers import FIFOScheduler, TrialScheduler

        hooks = self

        class Rungs(FIFOScheduler):
            def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
                number = hooks.numbers[trial.trial_id]
                if "numbers" in result:
                    found = json.loads(result["numbers"])
                    shown = "  ".join(f"{name} {x:.5g}" for name, x in found.items() if x is not None)
                    hooks.detail(f"trial {number}  step {result['step']}  {shown}")
                    if hooks.search.on_validation(number, result["step"], found):
                        hooks.search.request_stop(number)
                return str(TrialScheduler.CONTINUE)

            def __reduce__(self) -> tuple[Any, ...]:
                return (FIFOScheduler, ())

        return Rungs()  # type: ignore[no-untyped-call]

    def callback(self) -> Any:
        """Prints a line for each process that died and starts again."""
        from ray.tune import Callback

        hooks = self

        class Deaths(Callback):
            def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                number = hooks.numbers[trial.trial_id]
                reason = hooks.heartbeats.death(number)
                hooks.search.echo(f"trial {number}: {reason}; it goes on from its last checkpoint")

            def __reduce__(self) -> tuple[Any, ...]:
                return (Callback, ())

        return Deaths()


def _tuner(hooks: _Hooks, resources: dict[str, Any], parallel: int, max_failures: int) -> Any:
    from ray import tune

    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # our callback reports a death in one line
    return tune.Tuner(
        tune.with_resources(tune_worker, tune.PlacementGroupFactory([resources])),
        tune_config=tune.TuneConfig(
            search_alg=hooks.searcher(),
            scheduler=hooks.scheduler(),
            num_samples=hooks.search.left,
            max_concurrent_trials=parallel,
            reuse_actors=True,  # libraries are loaded once, not once per trial
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(hooks.work),
            failure_config=tune.FailureConfig(max_failures=max_failures),
            callbacks=[hooks.callback()],
            verbose=0,
        ),
    )


def _name(trial: Any) -> str:
    return f"{trial.config['trial']:03d}"


def _drive(
    search: SearchController, tuner: Any, heartbeats: HeartbeatMonitor, stop_requested: Callable[[], bool]
) -> None:
    thread = ControllerThread("ray-tune", tuner.fit)
    thread.start()
    while not thread.wait(_POLL_SECONDS):
        heartbeats.look(list(search.running))
        if stop_requested():
            search.stop_all()
        if search.stopping:
            for number in list(search.running):
                search.request_stop(number)  # again and again: a trial may have started only now
    if isinstance(thread.error, UserError):
        raise thread.error
    if thread.error is not None and search.error is None:
        raise RuntimeError(f"Ray Tune failed\n{thread.error}") from thread.error
    if not (search.stopping or search.complete):
        raise RuntimeError("Ray Tune came to an end with trials left")
