"""Where the time goes between a command and the first step of training.

A start has stages, one after the other, in several processes: a batch job's supervisor, a launcher, Ray, the rank. Each
process adds the wall-clock time at which a stage begins and passes the list on: through $VAEDIST_STARTUP from process
to process, in `FitOptions` from a launcher to its ranks. Rank 0 prints the summary after the first step. For a group
that replaces a lost one, the launcher reports the time (`vaedist.launchers.recovery`).
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping

from vaedist.runs.run_lock import process_start_ticks

VARIABLE = "VAEDIST_STARTUP"
_SHORTEST_SHOWN = 0.05  # seconds

StartupTimings = tuple[tuple[str, float], ...]
"""The name of each stage of a start, and when it began by `time.time()`."""


def timings_from_environment(environment: Mapping[str, str] = os.environ) -> StartupTimings:
    """The timings before this process; none where the variable is not set or not valid."""
    try:
        return tuple((str(name), float(when)) for name, when in json.loads(environment.get(VARIABLE, "[]")))
    except (ValueError, TypeError):
        return ()


def timings_to_environment(timings: StartupTimings) -> dict[str, str]:
    """The environment variable for a process that continues them."""
    return {VARIABLE: json.dumps(timings)}


def process_start_time() -> float:
    """When this process was started, in the kernel's resolution of 10 ms."""
    ticks = process_start_ticks(os.getpid())
    assert ticks is not None, "it runs"
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age


def startup_summary(timings: StartupTimings, end: float) -> str:
    """One line: how long it took from the beginning of the first stage to `end`, and each stage's share."""
    starts = [when for _, when in timings]
    lasted = [after - before for before, after in itertools.pairwise([*starts, end])]
    parts = [
        f"{name} {seconds:.1f} s"
        for (name, _), seconds in zip(timings, lasted, strict=True)
        if seconds >= _SHORTEST_SHOWN
    ]
    return f"first step after {end - starts[0]:.1f} s: {', '.join(parts)}"
