"""How far a run has come: what it has counted, and the window of steps that the next log row averages.

The window holds one row of sums per step and rank. It is added over ranks only when a row is printed or a
checkpoint is saved, and always in the same order, so a run that was stopped between two log rows prints the
very digits of one that was not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vaedist.config import Job
from vaedist.training.dist import Group
from vaedist.training.schedules import better


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
        self._names: list[str] = list(state.get("names", []))
        self._totals: list[Tensor] = list(state.get("window", []))
        self._rows: list[Tensor] = []

    def accepted(self, terms: dict[str, Tensor], rows: int) -> None:
        """Take in one step's sums over this process's `rows` rows; no waiting for the device."""
        self.bad_in_a_row = 0
        if list(terms) != self._names and (self._rows or self._totals):
            # A phase that starts late brings new terms; the window then begins with it.
            self._rows, self._totals = [], []
        self._names = list(terms)
        values = list(terms.values())
        count = torch.full_like(values[0], float(rows)) if values else torch.zeros((), dtype=torch.float64)
        self._rows.append(torch.stack([count, *values]))

    def refused(self) -> None:
        self.skipped += 1
        self.bad_in_a_row += 1

    def validated(self, numbers: dict[str, float], job: Job, settled: bool) -> bool:
        """Take in a validation; True if it is the best so far. Nothing is best before the schedules have ended."""
        self.validation = numbers
        if not settled:
            return False
        monitor = job.train.monitor
        if better(numbers[monitor.metric], self.best, monitor):
            self.best, self.waited = numbers[monitor.metric], 0
            return True
        self.waited += 1
        return False

    def row(self) -> dict[str, float]:
        """Mean of every term over the images of the window, which starts anew; NaN if all steps were skipped."""
        totals = self._add_up()
        self._totals = []
        result = {"skipped": float(self.skipped)}
        if totals:
            count, *sums = torch.stack(totals).sum(0).tolist()
            result = {name: value / count for name, value in zip(self._names, sums, strict=True)} | result
        return result

    def state(self) -> dict[str, Any]:
        """Plain numbers and tensors for the checkpoint. Called on every rank."""
        return {
            "skipped": self.skipped,
            "bad_in_a_row": self.bad_in_a_row,
            "best": self.best,
            "waited": self.waited,
            "validation": self.validation,
            "names": self._names,
            "window": self._add_up(),
        }

    def _add_up(self) -> list[Tensor]:
        """The window's steps, each added over ranks."""
        if self._rows:
            self._totals += list(self._group.total(torch.stack(self._rows)).cpu())
            self._rows = []
        return list(self._totals)
