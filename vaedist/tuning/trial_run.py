"""One trial: an ordinary job in an ordinary run folder, trained by whoever is asked, then measured.

What is trained is `Space.job` of the settings in the record, so `vaedist-train RUN/trials/003/job.yaml` in a folder of
its own gives the same weights, and `vaedist-evaluate --split validate` the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vaedist.config.job import Job
from vaedist.core.errors import Diverged, OutOfMemory, UserError, WorkerLost
from vaedist.runs import stop_request
from vaedist.runs.fit_options import Outcome
from vaedist.runs.run_lock import RunLocked
from vaedist.tuning.trial_log import Record, run_folder

_LOCK_WAIT_SECONDS = 60.0
"""How long a trial waits for its own earlier process, which a killed search may leave behind for some seconds."""


def run_trial(
    folder: Path, number: int, data: str, train: Callable[[Job, Path], Outcome], *, device: str = "cpu"
) -> dict[str, Any]:
    """Train and measure a trial of the record in `folder`; what became of it, as JSON values.

    Args:
        folder: Of the search.
        number: Of the trial.
        data: Folder of the shards.
        train: Trains a job in a run folder.
        device: Where it is measured.

    Returns:
        `status` is `finished`, `stopped early` (both with `measures`), `failed` (with a `reason`: these settings do not
        work), `stopped` (on request: the trial goes on another time) or `error` (with the kind of `error` and its
        `text`: no other trial would fare better).
    """
    from vaedist.tuning.measure import measure

    record = Record.read(folder)
    assert record is not None
    trial, place = record.trials[number], run_folder(folder, number)
    job = record.space.job(trial.settings, data, f"{record.space.name}-{number:03d}")
    began = time.monotonic()
    step, status = trial.halted or 0, "stopped early"
    try:
        if trial.halted is None:
            (place / stop_request.STOP_FILE).unlink(missing_ok=True)  # asked of an attempt that has ended
            outcome = _train(job, place, train)
            step, status = outcome.step, "finished"
            if outcome.status == "stopped":
                now = Record.read(folder)
                assert now is not None
                if now.trials[number].halted is None:
                    return {"status": "stopped"}
                status = "stopped early"
        measures = measure(place, record.space, device=device)
    except (Diverged, OutOfMemory, WorkerLost) as error:  # too much memory for one is not too much for all
        return {"status": "failed", "reason": str(error), "step": step, "seconds": time.monotonic() - began}
    except UserError as error:
        return {"status": "error", "error": type(error).__name__, "text": str(error)}
    return {"status": status, "step": step, "seconds": time.monotonic() - began, "measures": measures}


def _train(job: Job, place: Path, train: Callable[[Job, Path], Outcome]) -> Outcome:
    deadline = time.monotonic() + _LOCK_WAIT_SECONDS
    while True:
        try:
            return train(job, place)
        except RunLocked:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
