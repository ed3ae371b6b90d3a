"""Finds trials of a search whose process is stopped (SIGSTOP, a frozen machine), and kills them.

Ray does not ask a process that has started a task whether it still runs. So a thread of each trial's process rewrites
a small file in the search's work folder, which every node sees, once a second; the driver reads the files of the
running trials and kills a process whose file has not changed for `hang_seconds` (`vaedist.distributed.liveness`). A
process whose training thread stalls ends itself, and writes the reason beside that file.

Tune notices the death, starts the trial again from its checkpoint, and counts the failure.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vaedist.distributed.liveness.silence import SilenceClock, heartbeat
from vaedist.launchers.ray.cluster import current_node, run_on_node
from vaedist.runs.run_lock import process_start_ticks


def _beats(work: Path, number: int) -> Path:
    return work / f"beat-{number:03d}.json"


def _death(work: Path, number: int) -> Path:
    return work / f"lost-{number:03d}.txt"


@contextlib.contextmanager
def heartbeat_file(work: Path, number: int) -> Iterator[None]:
    """Send the heartbeats of a trial; for the trial's process."""
    path, counter = _beats(work, number), itertools.count(1)
    process = {"pid": os.getpid(), "started": process_start_ticks(os.getpid()), "node": current_node()}
    try:
        with heartbeat(lambda: path.write_text(json.dumps({**process, "beat": next(counter)}))):
            yield
    finally:
        path.unlink(missing_ok=True)


def record_death(work: Path, number: int, reason: str) -> None:
    """Write why a trial's process ends."""
    _death(work, number).write_text(reason)


class HeartbeatMonitor:
    """Reads the heartbeats of a search's trials; for the driver.

    Args:
        work: The work folder of the search.
        hang_seconds: How long a process may be silent; 0: for ever.
    """

    def __init__(self, work: Path, hang_seconds: float) -> None:
        self._work, self._hang = work, hang_seconds
        self._last: dict[int, str] = {}
        self._clock = SilenceClock()

    def look(self, running: Iterable[int]) -> None:
        """Kill the processes that have been silent for too long."""
        silent = []
        for number in running if self._hang else ():
            try:
                text = _beats(self._work, number).read_text()
            except OSError:
                continue  # it has not started, or its node's view of the folder is late
            if text == self._last.get(number):
                silent.append(number)
            else:
                self._last[number] = text
                self._clock.reset(number)
        self._clock.look(*silent)
        for number in silent:
            if self._clock.seconds[number] > self._hang:
                self._clock.reset(number)
                if self._last[number] and _kill(json.loads(self._last[number])):
                    reason = f"its process gave no sign of life for {self._hang:.0f} s and was killed"
                    record_death(self._work, number, reason)

    def death(self, number: int) -> str:
        """Why a trial's process died, as far as it is known; to be asked once per death."""
        path = _death(self._work, number)
        try:
            return path.read_text() or "its process died"
        except OSError:
            return "its process died"
        finally:
            path.unlink(missing_ok=True)


def _kill(process: dict[str, Any]) -> bool:
    """Whether there was such a process; assumed of one on another node."""
    if process["node"] == current_node():
        return kill_process(process["pid"], process["started"])
    run_on_node(process["node"], kill_process, process["pid"], process["started"])
    return True


def kill_process(pid: int, since: int) -> bool:
    """Kill the process of this machine that has this number and start time; whether it was there."""
    if process_start_ticks(pid) != since:
        return False
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False
