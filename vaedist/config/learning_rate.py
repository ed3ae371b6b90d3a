"""Learning-rate schedules as pure functions of the step, and reduce-on-plateau, which has a state.

`factor(optim, step, total)` multiplies the phase's learning rate. It depends on nothing but its arguments, so a
resumed run needs no schedule state. Plateau is the exception: the few numbers of `PlateauState` are kept in the
checkpoint.
"""

from __future__ import annotations

import math
from typing import Any

from vaedist.config.job import Cosine, Monitor, MultiStep, Optim, Plateau


def factor(optim: Optim, step: int, total: int) -> float:
    """Factor on the learning rate at optimizer step `step` (from 0) of `total`.

    Warm-up is linear and reaches 1 at step `warmup`; its first step already moves. Cosine (Loshchilov and
    Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, without restarts) reaches `final` at
    the last step.
    """
    schedule = optim.schedule
    if step < schedule.warmup:
        return (step + 1) / (schedule.warmup + 1)
    if isinstance(schedule, Cosine):
        span = max(1, total - 1 - schedule.warmup)
        progress = min(1.0, (step - schedule.warmup) / span)
        return schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * progress))
    if isinstance(schedule, MultiStep):
        return float(schedule.gamma ** sum(step >= milestone for milestone in schedule.milestones))
    return 1.0


def better(value: float, best: float | None, monitor: Monitor, threshold: float = 0.0) -> bool:
    """Whether `value` improves on `best` by more than `threshold`, relative to |best|. NaN never does."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    margin = threshold * abs(best)
    return value < best - margin if monitor.mode == "min" else value > best + margin


class PlateauState:
    """Reduce-on-plateau of one phase: cut the rate when the monitored number has stopped improving."""

    def __init__(self, schedule: Plateau, monitor: Monitor) -> None:
        self.schedule, self.monitor = schedule, monitor
        self.factor = 1.0
        self.best: float | None = None
        self.waited = 0

    def step(self, value: float) -> bool:
        """Take in a validation result; True if the rate was cut."""
        if better(value, self.best, self.monitor, self.schedule.threshold):
            self.best, self.waited = value, 0
            return False
        self.waited += 1
        if self.waited < self.schedule.patience:
            return False
        self.waited = 0
        before = self.factor
        self.factor = max(self.schedule.floor, self.factor * self.schedule.factor)
        return self.factor < before

    def state(self) -> dict[str, Any]:
        return {"factor": self.factor, "best": self.best, "waited": self.waited}

    def load(self, state: dict[str, Any]) -> None:
        self.factor, self.best, self.waited = state["factor"], state["best"], state["waited"]
