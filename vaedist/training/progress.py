"""Counters of a run, and the mean of every term since the last log row.

Each step adds one row of sums per rank. Rows are kept apart by their set of terms, because a phase that is not trained
at every step has its terms in some steps only. They are added over ranks only for a log row or a checkpoint, and always
in the same order: a run that was stopped between two log rows prints the same digits as an uninterrupted one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vaedist.config.job import Job
from vaedist.config.learning_rate import better
from vaedist.distributed.process_group import Group


class Progress:
    """Counters of a run; the same on every rank.

    Args:
        group: The processes whose rows are added.
        state: What `state()` gave, to continue a run.
    """

    def __init__(self, group: Group, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self._group = group
        self.skipped: int = state.get("skipped", 0)
        self.bad_in_a_row: int = state.get("bad_in_a_row", 0)
        self.best: float | None = state.get("best")
        self.waited: int = state.get("waited", 0)
        self.validation: dict[str, float] = dict(state.get("validation", {}))
        self._totals: dict[tuple[str, ...], list[Tensor]] = {
            tuple(part["names"]): list(part["totals"]) for part in state.get("windows", [])
        }
        self._rows: dict[tuple[str, ...], list[Tensor]] = {}

    def accepted(self, terms: dict[str, Tensor], rows: int) -> None:
        """Take in one step's sums over this process's `rows` rows; no waiting for the device."""
        self.bad_in_a_row = 0
        values = list(terms.values())
        count = torch.full_like(values[0], float(rows)) if values else torch.zeros((), dtype=torch.float64)
        self._rows.setdefault(tuple(terms), []).append(torch.stack([count, *values]))

    def refused(self) -> None:
        self.skipped += 1
        self.bad_in_a_row += 1

    def validated(self, numbers: dict[str, float], job: Job, schedules_ended: bool) -> bool:
        """Take in a validation; True if it is the best so far. Nothing is best before the schedules have ended."""
        self.validation = numbers
        if not schedules_ended:
            return False
        monitor = job.train.monitor
        if better(numbers[monitor.metric], self.best, monitor):
            self.best, self.waited = numbers[monitor.metric], 0
            return True
        self.waited += 1
        return False

    def stops_early(self, job: Job) -> bool:
        """Whether as many validations in a row as the job allows were no better than the best."""
        return job.train.early_stop is not None and self.waited >= job.train.early_stop

    def row(self) -> dict[str, float]:
        """Mean of every term over the images of the window's steps that had it; the window then starts anew."""
        parts = self._add_up()
        self._totals = {}
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for names, totals in parts.items():
            count, *values = torch.stack(totals).sum(0).tolist()
            for name, value in zip(names, values, strict=True):
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0.0) + count
        return {name: value / counts[name] for name, value in sums.items()} | {"skipped": float(self.skipped)}

    def state(self) -> dict[str, Any]:
        """Plain numbers and tensors for the checkpoint. Called on every rank."""
        return {
            "skipped": self.skipped,
            "bad_in_a_row": self.bad_in_a_row,
            "best": self.best,
            "waited": self.waited,
            "validation": self.validation,
            "windows": [{"names": list(names), "totals": totals} for names, totals in self._add_up().items()],
        }

    def _add_up(self) -> dict[tuple[str, ...], list[Tensor]]:
        """The window's steps, each added over ranks; the same sets of terms in the same order on each."""
        for names, rows in self._rows.items():
            self._totals.setdefault(names, []).extend(self._group.total(torch.stack(rows)).cpu())
        self._rows = {}
        return dict(self._totals)
