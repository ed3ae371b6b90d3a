"""Trials of a search whose process lives but does not run (SIGSTOP, a frozen machine): found and killed by the driver.

Ray asks nothing of a process that has once started a task. So a thread of each trial's process rewrites a small file
in the search's work folder, which every node sees, once a second; the driver looks at the files of the trials that
run, and kills a process that has written nothing for `hang_seconds`. Silence is counted in the driver's own looks, so
a driver that was stopped itself blames nobody. A process whose training thread alone stands still ends itself, and
leaves its last sentence beside that file (`vaedist.distributed.pulse`).

Tune notices the death, starts the trial again from its checkpoint, and counts it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vaedist.distributed.watchdog import BEAT_SECONDS
from vaedist.launchers.ray.cluster import on_node, this_node
from vaedist.runs.run_lock import process_start_ticks

_LOOK_SECONDS = 0.5


def _beats(work: Path, number: int) -> Path:
    return work / f"beat-{number:03d}.json"


def _last_words(work: Path, number: int) -> Path:
    return work / f"lost-{number:03d}.txt"


# In the trial's process -------------------------------------------------------------------------------------


@contextlib.contextmanager
def beating(work: Path, number: int) -> Iterator[None]:
    """Give signs of life for a trial while this is open."""
    path, over = _beats(work, number), threading.Event()
    who = {
        "pid": os.getpid(),
        "started": process_start_ticks(os.getpid()),
        "node": this_node(),
    }

    def beat() -> None:
        count = 0
        while True:
            count += 1
            with contextlib.suppress(OSError):  # a full disk is told by those who need it
                path.write_text(json.dumps({**who, "beat": count}))
            if over.wait(BEAT_SECONDS):
                return

    beats = threading.Thread(target=beat, name="vaedist-beat", daemon=True)
    beats.start()
    try:
        yield
    finally:
        over.set()
        beats.join()
        path.unlink(missing_ok=True)


def lost(work: Path, number: int, sentence: str) -> None:
    """Leave the last sentence of a trial's process."""
    _last_words(work, number).write_text(sentence)


# In the driver ----------------------------------------------------------------------------------------------


class Hearts:
    """Listens to the trials of a search.

    Args:
        work: Its work folder.
        hang_seconds: How long a process may be silent; 0: for ever.
    """

    def __init__(self, work: Path, hang_seconds: float) -> None:
        self._work, self._hang = work, hang_seconds
        self._heard: dict[int, str] = {}
        self._silent: dict[int, float] = {}
        self._looked = time.monotonic()

    def look(self, running: Iterable[int]) -> None:
        """Kill what has been silent for too long."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * _LOOK_SECONDS), now
        for number in running if self._hang else ():
            try:
                text = _beats(self._work, number).read_text()
            except OSError:
                continue  # it has not begun, or its node's view of the folder is late
            if text != self._heard.get(number):
                self._heard[number], self._silent[number] = text, 0.0
                continue
            self._silent[number] += passed
            if self._silent[number] > self._hang:
                self._silent[number] = 0.0
                if text and _killed(json.loads(text)):
                    lost(
                        self._work,
                        number,
                        f"its process gave no sign of life for {self._hang:.0f} s and was killed",
                    )

    def why(self, number: int) -> str:
        """What is known of the death of a trial's process; asked once for each."""
        path = _last_words(self._work, number)
        try:
            return path.read_text() or "its process died"
        except OSError:
            return "its process died"
        finally:
            path.unlink(missing_ok=True)


def _killed(who: dict[str, Any]) -> bool:
    """Whether there was such a process; of one on another node it is taken for granted."""
    if who["node"] == this_node():
        return kill_here(who["pid"], who["started"])
    on_node(who["node"], kill_here, who["pid"], who["started"])
    return True


def kill_here(pid: int, since: int) -> bool:
    """Kill a process of this machine if it is still the one that was meant."""
    if process_start_ticks(pid) != since:
        return False
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False
