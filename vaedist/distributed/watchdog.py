"""The process beside a rank that sees whether it still runs.

A rank that is stopped (SIGSTOP) dies no death that `srun` could see, and the others would wait for it in a collective
for half an hour. So each rank starts this file as a child, and a thread of it says a byte every second; the child kills
a rank that has been silent for too long, and `srun` then ends the others. Under the other engines the launcher does so.

The child loads nothing but what Python brings along, ignores the signals that Slurm sends to every process of a step,
and ends when the rank does. Silence is counted in its own looks: where Slurm suspends a whole job, nobody is blamed.
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
from collections.abc import Callable, Iterator

BEAT_SECONDS = 1.0
LOADING_SECONDS = 180.0
"""The silence allowed to a rank that is still loading: libraries from a busy network disk hold Python's lock."""

_LOOK_SECONDS = 0.5
_LOADED = b"+"


@contextlib.contextmanager
def watchdog(who: str, hang_seconds: float) -> Iterator[Callable[[], None]]:
    """Have this process killed should it be silent for `hang_seconds`, while the block runs.

    Args:
        who: What the sentence that tells of it calls this process.
        hang_seconds: 0: it is not watched.

    Yields:
        What to call once all libraries are loaded; until then at least LOADING_SECONDS are allowed.
    """
    if not hang_seconds:
        yield lambda: None
        return
    heard = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCONT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, heard)  # the child inherits it
    try:
        command = [sys.executable, "-IS", __file__, str(os.getpid()), str(hang_seconds), who]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert child.stdin is not None
    over, pipe = threading.Event(), child.stdin.fileno()

    def say(byte: bytes) -> None:
        with contextlib.suppress(OSError):  # the child was killed: then nobody watches
            os.write(pipe, byte)

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            say(b".")

    beating = threading.Thread(target=beat, name="vaedist-beat", daemon=True)
    beating.start()
    try:
        yield lambda: say(_LOADED)
    finally:
        over.set()
        beating.join()
        with contextlib.suppress(OSError):
            child.stdin.close()
        child.kill()
        child.wait()


def _watch(rank: int, hang_seconds: float, who: str) -> None:
    """Read what the rank says until it ends."""
    limit = max(hang_seconds, LOADING_SECONDS)
    silent, looked = 0.0, time.monotonic()
    while os.getppid() == rank:
        if select.select([0], [], [], _LOOK_SECONDS)[0]:
            said = os.read(0, 4096)
            if not said:
                return
            if _LOADED in said:
                limit = hang_seconds
            silent = 0.0
        # However long the last look is ago, it counts as one: this process may have been stopped itself.
        now = time.monotonic()
        passed, looked = min(now - looked, 2 * _LOOK_SECONDS), now
        silent += passed
        if silent > limit:
            told = f"vaedist: {who} did not answer for {silent:.0f} s (stopped, frozen, or its machine hung): killed"
            print(told, file=sys.stderr, flush=True)
            if os.getppid() == rank:
                os.kill(rank, signal.SIGKILL)
            return


if __name__ == "__main__":
    _watch(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
