"""A rank whose process lives while the thread that trains stands still: found by the rank itself, told, and ended.

A deadlock, a loop without an end, or a read from a file system that has died stops one thread. The process still
answers, so its launcher sees nothing, and the other ranks wait for it in a collective for half an hour. Here a second
thread of every rank looks at the first once a second, and ends the process once it is sure:

| what the training thread is in | it counts as stuck |
|---|---|
| a step (`strict`), and other ranks wait for it | after `hang_seconds` without a mark |
| a step, and nobody waits for it | after 4 times that |
| anything else: reading, validating, saving, the first step | after 4 times that without a sign of work |

A mark is left at both ends of a step, after forward and backward, and at every collective. In a step they come often,
so a thread that computes without leaving one is stuck too (never sooner than after ten of the longest steps so far).
Steps of a compiled model are none of these: any may be compiled anew. Elsewhere work may honestly take long: there
every sign of work counts, which is CPU time of the thread (a thread that is blocked uses none at all), noticeable CPU
time or reading and writing of the whole process, or CPU time of programs that it has started, such as a compiler.

Of many ranks that stand still, those that have entered more collectives wait for those that have entered fewer. Only
these can be stuck. The counts are in the store at which the ranks have met; each rank judges itself alone, by its own
clock, counted in its own looks, so a machine that slept blames nobody.

Nothing is waited for here that the fault could hold up: the store has a connection of its own, and what is told is
told by threads that are left behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

from vaedist.core.errors import WorkerLost

NAME = "stuck.txt"
"""File in the run folder: where every thread of a rank stood that was ended."""

Tell = Callable[[str], None]

_PATIENCE = 4
_STEPS = 10
"""A step may take so many times as long as the longest one so far."""
_LOOK_SECONDS = 1.0
_LAST_WORDS_SECONDS = 5.0
_BUSY = 0.02
"""CPU seconds per second of all threads that mean work; Ray's and torch's own threads use less when idle."""
_MOVED = 1 << 16
"""Bytes read and written between two looks that mean work."""


class Peers(Protocol):
    """The other ranks: what `Group` gives."""

    def publish(self, met: int) -> None:
        """Let the others know how many collectives this rank has entered or left."""

    def counts(self) -> Sequence[int]:
        """The same of all ranks; those that have told nothing are left out."""


class Alone:
    """No other ranks."""

    def publish(self, met: int) -> None:
        """Nobody listens."""

    def counts(self) -> Sequence[int]:
        """Nobody."""
        return ()


class Pulse:
    """How far the training thread has come, and the watch over it. Without `watched` it only counts.

    Attributes:
        marks: Signs of progress so far.
        met: Collectives entered and left so far: the same program runs on all ranks, so the numbers compare.
    """

    def __init__(self) -> None:
        self.marks, self.met = 0, 0
        self._meeting = False
        self._strict = False
        self._longest, self._marked = 0.0, 0.0  # seconds between two marks of a step

    # What the training thread calls -------------------------------------------------------------------------

    def mark(self) -> None:
        """Something has been done."""
        now = time.monotonic()
        if self._strict and not self._meeting:
            self._longest = max(self._longest, now - self._marked)
        self._marked = now
        self._meeting = False
        self.marks += 1

    def meet(self) -> None:
        """From here to the next mark this rank may wait for others."""
        self.mark()
        self._meeting = True
        self.met += 1

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """Around a collective."""
        self.meet()
        yield
        self.mark()
        self.met += 1

    @contextlib.contextmanager
    def strict(self, wanted: bool = True) -> Iterator[None]:
        """Around what leaves marks often enough to be judged by them; with `wanted` false it changes nothing."""
        self.mark()
        self._strict = wanted
        try:
            yield
        finally:
            self.mark()
            self._strict = False

    # The watch ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watched(
        self,
        hang_seconds: float,
        folder: Path,
        tell: Tell,
        *,
        who: str = "this process",
        peers: Peers | None = None,
    ) -> Iterator[None]:
        """Watch over the calling thread; the process is ended should it stand still.

        Args:
            hang_seconds: See the module; 0: for ever.
            folder: Of the run, where `stuck.txt` goes.
            tell: Takes one sentence; called from a thread of its own, which may block.
            who: What the sentence calls this process.
            peers: The other ranks, if there are any.
        """
        if not hang_seconds:
            yield
            return
        over = threading.Event()
        judge = _Judge(self, hang_seconds, peers or Alone())

        def watch() -> None:
            while not over.wait(min(_LOOK_SECONDS, hang_seconds / 4)):
                seconds = judge.look()
                if seconds is not None:
                    _end(judge.thread, folder / NAME, tell, who, seconds)

        watching = threading.Thread(target=watch, name="vaedist-pulse", daemon=True)
        watching.start()
        try:
            yield
        finally:
            over.set()
            if threading.current_thread() is not watching:
                watching.join(_LAST_WORDS_SECONDS)


class _Judge:
    """Looks at the thread that made it, from another one."""

    def __init__(self, pulse: Pulse, hang_seconds: float, peers: Peers) -> None:
        self.thread = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self.thread)
        self._pulse, self._hang, self._peers = pulse, hang_seconds, peers
        self._looked = time.monotonic()
        self._marks = pulse.marks
        self._work = _work(self._clock)
        self._unmarked = self._idle = 0.0  # seconds

    def look(self) -> float | None:
        """How long the thread has stood still, if that is too long."""
        pulse, now = self._pulse, time.monotonic()
        # However long the last look is ago, it counts as one: this process may have been stopped itself.
        passed, self._looked = min(now - self._looked, 2 * _LOOK_SECONDS), now
        before, self._work = self._work, _work(self._clock)
        self._unmarked += passed
        self._idle += passed
        if self._work.is_more_than(before, passed):
            self._idle = 0.0
        if pulse.marks != self._marks:
            self._marks = pulse.marks
            self._unmarked = self._idle = 0.0
        self._peers.publish(pulse.met)
        if self._unmarked < self._hang:
            return None
        counts = self._peers.counts()
        if any(other < pulse.met for other in counts):
            return None  # it waits for them
        ahead = any(other > pulse.met for other in counts)
        if pulse._meeting and not ahead:
            return None  # all wait for each other: the network's fault, and the collective's deadline
        patience = self._hang * _PATIENCE
        if pulse._strict and not pulse._meeting:
            limit = max(self._hang if ahead else patience, _STEPS * pulse._longest)
            return self._unmarked if self._unmarked >= limit else None
        return self._idle if self._idle >= patience else None


class _Work(NamedTuple):
    """What the process has done so far."""

    thread: float  # CPU seconds of the training thread
    process: float  # CPU seconds of all threads but the one that looks
    moved: int  # bytes
    children: float  # CPU seconds of its descendants

    def is_more_than(self, before: _Work, seconds: float) -> bool:
        return (
            self.thread > before.thread
            or self.process - before.process > _BUSY * seconds
            or self.moved - before.moved > _MOVED
            or self.children > before.children
        )


def _work(clock: int) -> _Work:
    process = time.process_time() - time.thread_time()
    return _Work(time.clock_gettime(clock), process, _moved(), _cpu_of_children(os.getpid()))


def _moved() -> int:
    """Bytes that this process has read and written, from wherever."""
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/self/io").read_text().splitlines()[:2]
        return sum(int(line.split()[1]) for line in lines)
    return 0


def _cpu_of_children(parent: int) -> float:
    """CPU seconds of all living descendants, and of those that they have waited for."""
    total = 0.0
    for task in _listed(f"/proc/{parent}/task"):
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{parent}/task/{task}/children").read_text().split():
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
                total += _cpu_of_children(int(child))
    return total


def _listed(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []


# The end ----------------------------------------------------------------------------------------------------


def _end(thread: int, place: Path, tell: Tell, who: str, seconds: float) -> None:
    """Say it, write down where every thread stands, and end this process; nothing here may wait for long."""
    where = _place(sys._current_frames().get(thread))
    sentence = f"{who} stood still for {seconds:.0f} s{where} and was ended ({NAME}: where its threads stood)"
    words: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
        (tell, (sentence,)),
        (_write, (place, sentence)),
    ]
    speaking = [threading.Thread(target=say, args=what, daemon=True) for say, what in words]
    for one in speaking:
        one.start()
    deadline = time.monotonic() + _LAST_WORDS_SECONDS
    for one in speaking:
        one.join(max(0.0, deadline - time.monotonic()))
    os._exit(WorkerLost.exit_code)


def _place(frame: FrameType | None) -> str:
    """Where a thread stands, in this package if it is anywhere in it."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] == "vaedist":
            return f" in {name}, line {frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return ""


def _write(place: Path, sentence: str) -> None:
    with contextlib.suppress(OSError), place.open("a", encoding="utf-8") as file:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        file.write(f"{stamp} {os.uname().nodename}, process {os.getpid()}: {sentence}. Its threads:\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        file.write("\n")


def on_stderr(sentence: str) -> None:
    """Tell it where no launcher listens."""
    print(f"vaedist: {sentence}", file=sys.stderr, flush=True)
