"""What Ray Tune runs for each trial: an ordinary run, which is watched and reports its validations to Tune."""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from vaedist.config.job import Job
from vaedist.distributed.liveness.stalls import StallMonitor
from vaedist.launchers.ray import trainer
from vaedist.launchers.ray.cluster import ResourceRequest
from vaedist.launchers.ray.heartbeat import heartbeat_file, record_death
from vaedist.runs.fit_options import FitOptions, Outcome
from vaedist.training.run_log import read_metrics
from vaedist.tuning.trial_log import run_folder

CONFIG_FILE = "orders.json"
"""File in the work folder: what is the same for all trials."""
_POLL_SECONDS = 0.5


def tune_worker(trial: dict[str, Any]) -> dict[str, Any]:
    """Train and measure one trial: one worker trains in this process, several are a Ray Train run.

    Args:
        trial: Its number (`trial`), and the work folder of the search (`work`).
    """
    from vaedist.tuning.trial_run import run_trial

    work, number = Path(trial["work"]), trial["trial"]
    config = json.loads((work / CONFIG_FILE).read_text())
    os.chdir(config["folder"])
    search, monitor, device = Path(config["search"]), StallMonitor(), "cuda" if config["gpus"] else "cpu"
    options = FitOptions(quiet=True, engine="ray tune", command=tuple(config["command"]))
    if config["workers"] == 1:
        train = partial(_fit, device=device, monitor=monitor, options=options)
    else:
        train = partial(_fit_with_ray_train, config=config, device=device, options=options)
    try:
        watched = monitor.watched(
            config["hang_seconds"],
            run_folder(search, number),
            partial(record_death, work, number),
            who="its process",
        )
        with heartbeat_file(work, number), watched:
            answer = run_trial(search, number, config["data"], train, device=device)
    except Exception:  # noqa: BLE001 - a bug: the driver shows it, and Tune need not try again
        answer = {"status": "error", "error": "RuntimeError", "text": traceback.format_exc()}
    return {"answer": json.dumps(answer), "at": time.time()}


def _report(metrics: dict[str, float]) -> None:
    """Report a validation to Tune."""
    from ray import tune

    prefix = "validation/"
    found = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    if found:
        tune.report({"step": int(metrics["step"]), "numbers": json.dumps(found)})


def _fit(job: Job, folder: Path, *, device: str, monitor: StallMonitor, options: FitOptions) -> Outcome:
    from vaedist.distributed.process_group import Group
    from vaedist.training.loop import fit

    group = Group.join(device, stall_monitor=monitor)
    try:
        return fit(job, folder, group=group, report=_report, options=options)
    finally:
        group.close()


def _fit_with_ray_train(
    job: Job, folder: Path, *, config: dict[str, Any], device: str, options: FitOptions
) -> Outcome:
    results: list[Outcome | BaseException] = []
    workers = config["workers"]
    request = ResourceRequest(workers, workers, config["cpus"], config["gpus"], device)
    limits = {name: config[name] for name in ("max_failures", "hang_seconds")}

    def train() -> None:
        try:
            results.append(trainer.run(job, folder, request, options=options, **limits))
        except BaseException as error:  # noqa: BLE001 - raised again below
            results.append(error)

    training = threading.Thread(target=train, name="ray-train", daemon=True)
    training.start()
    reported = -1
    while training.is_alive():
        training.join(_POLL_SECONDS)
        # Ray Train's own workers report to Ray Train; here the run's log is read, which has every number.
        for row in read_metrics(folder / "metrics.jsonl"):
            if row["kind"] == "validate" and row["step"] > reported:
                reported = row["step"]
                numbers = {f"validation/{name}": x for name, x in row.items() if isinstance(x, float | int)}
                _report({"step": reported, **numbers})
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]
