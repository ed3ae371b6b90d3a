"""A search under way: which trial is next, what became of it, and what that means for the others.

It belongs to the one process that holds the folder's lock; whatever it decides stands in the record before anybody acts
on it. It knows nothing of Ray: `vaedist.launchers.ray.tuner` asks it.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vaedist.core import errors
from vaedist.core.errors import UserError, WorkerLost
from vaedist.data.format.index import Index
from vaedist.runs import stop_request
from vaedist.tuning.asha import should_continue
from vaedist.tuning.dimensions import Setting
from vaedist.tuning.feasibility import SearchPlan, check_settings, plan_search
from vaedist.tuning.objectives import best_trial, value_of, values_of
from vaedist.tuning.results import trial_line, write_table
from vaedist.tuning.samplers import propose
from vaedist.tuning.space import Asha, Grid, Space, differences
from vaedist.tuning.trial_log import Record, Trial, run_folder

MOST_FAILURES = 3
"""So many trials that fail before any has ended well stop the search: something is wrong with all of them."""


class SearchController:
    """See the module. Its methods may be called from several threads.

    Args:
        record: Of this search.
        index: The data.
        plan: What is known beforehand.
        echo: Shows one line.
    """

    def __init__(self, record: Record, index: Index, plan: SearchPlan, echo: Callable[[str], None]) -> None:
        self.record, self.index, self.plan, self.echo = record, index, plan, echo
        self.running: set[int] = set()
        self.error: Exception | None = None
        """Why no further trial is started; raised once those that run have stopped."""
        self.stopping = False
        """Someone asked for an end: nothing new is started."""
        self._lock = threading.RLock()
        self._waiting = [trial for trial in record.trials if not trial.ended]

    @classmethod
    def open(cls, folder: Path, space: Space, index: Index, echo: Callable[[str], None]) -> SearchController:
        """The search in `folder`, begun or continued.

        Raises:
            UserError: it is another search's folder, or the space does not fit the data.
        """
        record = Record.read(folder)
        planned = plan_search(space, index)
        if planned.warning:
            echo(f"warning: {planned.warning}")
        if record is None:
            return cls(Record.create(folder, space, index.identity), index, planned, echo)
        changed = differences(record.space, space)
        if changed:
            raise UserError(
                f"{folder} holds a search through another space: {'; '.join(map(str, changed[:3]))}. Set it back, or "
                "search anew with another --run-dir"
            )
        if record.data != index.identity:
            raise UserError(
                f"{folder} holds a search on other data (data identity {record.data[:12]}, {index.folder} has "
                f"{index.identity[:12]}): give those data with --data, or search anew with another --run-dir"
            )
        record.space = space  # what may differ, such as the number of trials, is as asked now
        record.truncate_torn_line()
        return cls(record, index, planned, echo)

    @property
    def space(self) -> Space:
        return self.record.space

    @property
    def left(self) -> int:
        """Trials that may still be started; the ones that run are not counted."""
        with self._lock:
            total = self.space.trials
            if isinstance(self.space.search, Grid):
                total = sum(1 for _ in itertools.islice(self.space.combinations(), total))
            return len(self._waiting) + max(0, total - len(self.record.trials))

    @property
    def complete(self) -> bool:
        """Whether every trial has ended."""
        return not self.left and all(trial.ended for trial in self.record.trials)

    def next_trial(self) -> Trial | None:
        """The next trial to start: one that was interrupted, else a new one; None when there are no more."""
        with self._lock:
            if self.stopping:
                return None
            if self._waiting:
                trial = self._waiting.pop(0)
                self.running.add(trial.number)
                self.echo(f"trial {trial.number} goes on: {self.describe(trial.settings)}")
                return trial
            while len(self.record.trials) < self.space.trials:
                settings = propose(self.space, len(self.record.trials), self.record.trials)
                if settings is None:
                    return None  # a grid has no more
                trial = self.record.propose(settings)
                try:
                    check_settings(self.space, settings, self.index)
                except UserError as error:
                    self._failed(trial, str(error))
                    if self.stopping:
                        return None
                    continue
                self.running.add(trial.number)
                self.echo(f"trial {trial.number} starts: {self.describe(settings)}")
                return trial
            return None

    def on_validation(self, number: int, step: int, numbers: Mapping[str, float]) -> bool:
        """Take in a validation of a running trial; True if it is to stop there."""
        scheduler = self.space.scheduler
        if not isinstance(scheduler, Asha) or step not in self.plan.rungs:
            return False
        with self._lock:
            trial = self.record.trials[number]
            if trial.halted is not None:
                return True
            value = value_of(numbers, scheduler.metric)
            if value is None or step in trial.rungs:
                return False
            others = [other for other in self.record.trials if other.number != number]
            halt = not should_continue(scheduler, step, value, others)
            self.record.rung(trial, step, value, halt)
            if halt:
                self.echo(
                    f"trial {number} is behind at step {step} ({scheduler.metric} {value:.5g}): it stops there"
                )
            return halt

    def on_trial_end(self, number: int, answer: Mapping[str, Any] | None) -> None:
        """Take in a trial's end.

        Args:
            number: The trial.
            answer: What `vaedist.tuning.trial_run.run` gave; None: its process died more often than allowed.
        """
        with self._lock:
            self.running.discard(number)
            (self.folder_of(number) / stop_request.STOP_FILE).unlink(
                missing_ok=True
            )  # it has left: whoever trains on must not
            trial = self.record.trials[number]
            if trial.ended:
                return
            if answer is None:
                self._failed(
                    trial,
                    "its process died again and again (often the kernel, out of memory: ask for more, or search "
                    "smaller models)",
                )
            elif answer["status"] == "failed":
                self._failed(trial, answer["reason"], step=answer["step"], seconds=answer["seconds"])
            elif answer["status"] == "error":
                kind = getattr(errors, answer["error"], RuntimeError)
                self._stop(kind(f"trial {number}: {answer['text']}"))
            elif answer["status"] != "stopped":  # that one is unfinished, and goes on another time
                self.record.end(
                    trial,
                    answer["status"],
                    step=answer["step"],
                    seconds=answer["seconds"],
                    measures=answer["measures"],
                )
                self.echo(trial_line(self.space, self.record.trials, trial))
                self.write()

    def request_stop(self, number: int) -> None:
        """Ask a trial that runs to save and leave; nothing happens before its run folder is there."""
        with self._lock, contextlib.suppress(FileNotFoundError):
            if number in self.running:
                stop_request.write_stop_file(self.folder_of(number), "any")

    def stop_all(self) -> None:
        """Start nothing more."""
        with self._lock:
            self.stopping = True

    def write(self) -> None:
        """Results as far as there are any."""
        write_table(self.record)

    def best(self) -> Trial | None:
        """The best trial so far."""
        with self._lock:
            return best_trial(self.space, self.record.trials)

    def folder_of(self, number: int) -> Path:
        """Where a trial trains."""
        return run_folder(self.record.folder, number)

    def describe(self, settings: Mapping[str, Setting]) -> str:
        """Settings on one line."""
        return "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in settings.items()
        )

    def _failed(self, trial: Trial, reason: str, *, step: int = 0, seconds: float = 0.0) -> None:
        self.record.end(trial, "failed", step=step, seconds=seconds, reason=reason)
        self.echo(f"trial {trial.number} failed: {reason}")
        self.write()
        ended = [one for one in self.record.trials if one.ended]
        if len(ended) >= MOST_FAILURES and not any(values_of(self.space, one) for one in ended):
            self._stop(
                WorkerLost(f"the first {len(ended)} trials all failed, the last one because: {reason}")
                if "process died" in reason
                else UserError(f"the first {len(ended)} trials all failed, the last one because: {reason}")
            )

    def _stop(self, error: Exception) -> None:
        self.error = self.error or error
        self.stopping = True
