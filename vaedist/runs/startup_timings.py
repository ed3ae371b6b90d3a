"""Where the time goes between a command and the first step of training.

A start has phases, one after the other, in several processes: a batch job's supervisor, a launcher, Ray, the rank. Each
notes when a phase begins, by the wall clock, and hands the list on: through $VAEDIST_STARTUP from process to process,
in `FitOptions` from a launcher to its ranks. Rank 0 prints the sum once the first step is done. A group that replaces a
lost one says nothing here: its launcher tells where that time went (`vaedist.launchers.recovery`).
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence

from vaedist.runs.run_lock import started

VARIABLE = "VAEDIST_STARTUP"
_TOO_SHORT = 0.05  # seconds: not worth a word

Phases = tuple[tuple[str, float], ...]
"""What began when, by `time.time()`."""


def inherited(environment: Mapping[str, str] = os.environ) -> Phases:
    """The phases before this process; none where nobody told of them, or not in our words."""
    try:
        return tuple((str(name), float(when)) for name, when in json.loads(environment.get(VARIABLE, "[]")))
    except (ValueError, TypeError):
        return ()


def handed_on(phases: Phases) -> dict[str, str]:
    """For the environment of a process that goes on with them."""
    return {VARIABLE: json.dumps(phases)}


def process_began() -> float:
    """When this process was started, in the kernel's resolution of 10 ms."""
    ticks = started(os.getpid())
    assert ticks is not None, "it runs"
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age


def told(phases: Sequence[tuple[str, float]], end: float) -> str:
    """One line: how long it took from the first phase's beginning to `end`, and of what that is made."""
    starts = [when for _, when in phases]
    lasted = [after - before for before, after in itertools.pairwise([*starts, end])]
    parts = [
        f"{name} {seconds:.1f} s"
        for (name, _), seconds in zip(phases, lasted, strict=True)
        if seconds >= _TOO_SHORT
    ]
    return f"first step after {end - starts[0]:.1f} s: {', '.join(parts)}"
