"""Signs of life, and the time since the last one.

A process that is stopped (SIGSTOP, a frozen cgroup, a machine that swaps) does not exit, so no launcher is notified,
and the other ranks would wait for it in a collective for half an hour. A thread of every process therefore gives a
sign of life each second (`heartbeat`), and an observer kills a process that has been silent for `hang_seconds`. Each
launcher has its own transport: the pipe of a local rank, the monitor process beside a rank of srun (`watchdog`, which
runs this file as a script), a file per trial under Ray Tune. All count with the same `SilenceClock`.

This file imports only the standard library, because the script runs without site packages.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator

HANG_SECONDS = 45.0
"""How long a process may be silent before it counts as lost, where the user does not say."""
BEAT_SECONDS = 1.0
LOOK_SECONDS = 0.5
"""How often an observer looks at the processes that it observes."""
LOADING_SECONDS = 180.0
"""Silence allowed to a process that still imports libraries: reads from a slow network disk hold Python's lock."""


class SilenceClock:
    """How long each source has been silent, counted in looks of the observer.

    The time between two looks counts at most as two intervals. An observer that was itself stopped (Ctrl-Z, a closed
    laptop, a suspended Slurm job) thus blames nobody for the time it missed.
    """

    def __init__(self, interval: float = LOOK_SECONDS) -> None:
        self._longest, self._looked = 2 * interval, time.monotonic()
        self.seconds: defaultdict[Hashable, float] = defaultdict(float)

    def look(self, *silent: Hashable) -> float:
        """Add the time since the last look to these sources; that time, in seconds."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, self._longest), now
        for source in silent:
            self.seconds[source] += passed
        return passed

    def reset(self, *heard: Hashable) -> None:
        """These sources gave a sign of life."""
        for source in heard:
            self.seconds[source] = 0.0


@contextlib.contextmanager
def repeatedly(
    call: Callable[[], object], seconds: float, name: str, patience: float | None = None
) -> Iterator[None]:
    """Call `call` in a thread, at once and then every so many seconds, while the block runs; its OSErrors are ignored.

    Args:
        name: Of the thread.
        patience: How long to wait, at the end, for a call that has begun; None: as long as it takes.
    """
    over = threading.Event()

    def repeat() -> None:
        while True:
            with contextlib.suppress(OSError):
                call()
            if over.wait(seconds):
                return

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(patience)


def heartbeat(send: Callable[[], object]) -> contextlib.AbstractContextManager[None]:
    """Give a sign of life every second while the block runs."""
    return repeatedly(send, BEAT_SECONDS, "vaedist-heartbeat")


_LOADING, _LOADED = b".", b"+"
"""Heartbeats of a rank that still imports libraries, and of one that has imported them."""


@contextlib.contextmanager
def watchdog(who: str, hang_seconds: float) -> Iterator[Callable[[], None]]:
    """Have a child process kill this process if it is silent for `hang_seconds`, while the block runs.

    The child ignores the signals that Slurm sends to every process of a step.

    Args:
        who: How the message calls this process.
        hang_seconds: 0: do not watch.

    Yields:
        To be called once all libraries are loaded; until then at least LOADING_SECONDS are allowed.
    """
    if not hang_seconds:
        yield lambda: None
        return
    ignored = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCONT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ignored)  # the child inherits the mask
    try:
        command = [sys.executable, "-IS", __file__, str(os.getpid()), str(hang_seconds), who]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert child.stdin is not None
    pipe, state = child.stdin.fileno(), _LOADING

    def loaded() -> None:
        nonlocal state
        state = _LOADED

    try:
        with heartbeat(lambda: os.write(pipe, state)):
            yield loaded
    finally:
        with contextlib.suppress(OSError):
            child.stdin.close()
        child.kill()
        child.wait()


def _watch_parent(rank: int, hang_seconds: float, who: str) -> None:
    """The child process: read the heartbeats of process `rank` until it exits, or kill it."""
    limit, clock = max(hang_seconds, LOADING_SECONDS), SilenceClock()
    while os.getppid() == rank:
        if select.select([0], [], [], LOOK_SECONDS)[0]:
            beats = os.read(0, 4096)
            if not beats:
                return
            if _LOADED in beats:
                limit = hang_seconds
            clock.reset(rank)
        clock.look(rank)
        if clock.seconds[rank] > limit and os.getppid() == rank:
            silent = f"did not answer for {clock.seconds[rank]:.0f} s (stopped, frozen, or its machine hung)"
            print(f"vaedist: {who} {silent}: killed", file=sys.stderr, flush=True)
            os.kill(rank, signal.SIGKILL)
            return


if __name__ == "__main__":
    _watch_parent(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
