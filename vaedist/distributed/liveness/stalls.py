"""A training thread that stands still while its process lives.

A deadlock, an endless loop or a read from a dead file system blocks one thread, while the process keeps
sending heartbeats. A second thread of each process therefore looks at the training thread once a second
(`StallMonitor`) and ends the process when that thread has stalled:

| the training thread is in | it counts as stalled |
|---|---|
| a step (`strict`), and other ranks wait for this one | after `hang_seconds` without a tick |
| a step, and no rank waits for this one | after 4 times that |
| anything else: reading, validating, saving, the first step | after 4 times that without a sign of work |

The training thread calls `tick` at both ends of a step, after forward and backward, and at every collective. Within a
step ticks are frequent, so a thread that computes without a tick is stalled too, but never before ten times the
longest step so far. Steps of a compiled model are not strict, because any of them may compile again. Outside of steps
work may take long, so each sign of work resets the clock: CPU time of the training thread, noticeable CPU time or I/O
of the process, or CPU time of its child processes, such as a compiler.

Every rank counts the collectives that it has entered and left, and publishes the count in the store where the ranks
met. If many ranks stand still, those with higher counts wait for those with lower counts, so only the latter can have
stalled. Each rank compares the counts and judges only itself. The monitor never waits for anything that the stall
could block: it has a connection of its own to the store, and reports from threads that are abandoned after a few
seconds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Protocol

from vaedist.core.errors import WorkerLost
from vaedist.distributed.liveness.silence import SilenceClock, repeatedly

STACKS_FILE = "stuck.txt"
"""File in the run folder: the stacks of all threads of a stalled process."""
_PATIENCE = 4
_LONGEST_STEPS = 10
_STALL_LOOK_SECONDS = 1.0
_REPORT_SECONDS = 5.0
_BUSY = 0.02
"""CPU seconds per second of all threads that count as work; the idle threads of Ray and torch use less."""
_BYTES_MOVED = 1 << 16
"""Bytes read and written between two looks that count as work."""

StallReport = Callable[[str], None]
"""Takes one sentence about a process that was ended."""


def print_to_stderr(sentence: str) -> None:
    """The `StallReport` where no launcher listens."""
    print(f"vaedist: {sentence}", file=sys.stderr, flush=True)


class Peers(Protocol):
    """The other ranks: what `Group` gives."""

    def publish(self, collectives: int) -> None:
        """Tell the others how many collectives this rank has entered or left."""

    def counts(self) -> Sequence[int]:
        """The numbers of all ranks that have published one."""


class StallMonitor:
    """Counts what the training thread does, and ends the process if that thread stalls while `watched`.

    Attributes:
        ticks: Signs of progress so far.
        collectives: Collectives entered and left so far; comparable, because all ranks run the same program.
    """

    def __init__(self) -> None:
        self.ticks, self.collectives = 0, 0
        self.in_collective = self.is_strict = False
        self.longest_step = self._last_tick = 0.0  # seconds between two ticks of a step

    def tick(self) -> None:
        """The training thread has made progress."""
        now = time.monotonic()
        if self.is_strict and not self.in_collective:
            self.longest_step = max(self.longest_step, now - self._last_tick)
        self._last_tick = now
        self.in_collective = False
        self.ticks += 1

    def enter_collective(self) -> None:
        """Until the next tick this rank may wait for others."""
        self.tick()
        self.in_collective = True
        self.collectives += 1

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Around a collective."""
        self.enter_collective()
        yield
        self.tick()
        self.collectives += 1

    @contextlib.contextmanager
    def strict(self, enabled: bool = True) -> Iterator[None]:
        """Around code that ticks often enough to be judged by its ticks."""
        self.tick()
        self.is_strict = enabled
        try:
            yield
        finally:
            self.tick()
            self.is_strict = False

    @contextlib.contextmanager
    def watched(
        self,
        hang_seconds: float,
        folder: Path,
        report: StallReport,
        *,
        who: str = "this process",
        peers: Peers | None = None,
    ) -> Iterator[None]:
        """Watch the calling thread, and end the process if it stalls.

        Args:
            hang_seconds: See the module; 0: do not watch.
            folder: Of the run, for `stuck.txt`.
            report: Called from a thread of its own, and may block.
            who: How the sentence calls this process.
            peers: The other ranks, if there are any.
        """
        if not hang_seconds:
            yield
            return
        detector = StallDetector(self, hang_seconds, peers)

        def look() -> None:
            if (seconds := detector.look()) is not None:
                _report_and_exit(detector.thread, folder / STACKS_FILE, report, who, seconds)

        interval = min(_STALL_LOOK_SECONDS, hang_seconds / 4)
        with repeatedly(look, interval, "vaedist-stall-monitor", _REPORT_SECONDS):
            yield


class StallDetector:
    """Judges the thread that made it, from another thread."""

    def __init__(self, monitor: StallMonitor, hang_seconds: float, peers: Peers | None) -> None:
        self.thread = threading.get_ident()
        self._cpu_clock = time.pthread_getcpuclockid(self.thread)
        self._monitor, self._hang, self._peers = monitor, hang_seconds, peers
        self._clock = SilenceClock(_STALL_LOOK_SECONDS)
        self._ticks = monitor.ticks
        self._work = _Work.measure(self._cpu_clock)

    def look(self) -> float | None:
        """For how many seconds the thread has stalled; None: it has not."""
        monitor, silent = self._monitor, self._clock.seconds
        passed = self._clock.look("ticks", "work")
        before, self._work = self._work, _Work.measure(self._cpu_clock)
        if self._work.exceeds(before, passed):
            self._clock.reset("work")
        if monitor.ticks != self._ticks:
            self._ticks = monitor.ticks
            self._clock.reset("ticks", "work")
        if self._peers is not None:
            self._peers.publish(monitor.collectives)
        if silent["ticks"] < self._hang:
            return None
        counts = [] if self._peers is None else self._peers.counts()
        if any(count < monitor.collectives for count in counts):
            return None  # this rank waits for others
        waited_for = any(count > monitor.collectives for count in counts)
        if monitor.in_collective and not waited_for:
            return None  # all ranks wait for each other: a fault of the network, which the collective's timeout ends
        patience = self._hang * _PATIENCE
        if monitor.is_strict and not monitor.in_collective:
            limit = max(self._hang if waited_for else patience, _LONGEST_STEPS * monitor.longest_step)
            return silent["ticks"] if silent["ticks"] >= limit else None
        return silent["work"] if silent["work"] >= patience else None


class _Work(NamedTuple):
    """What the process has done so far."""

    thread: float  # CPU seconds of the training thread
    process: float  # CPU seconds of all threads but the one that looks
    moved: int  # bytes read and written
    children: float  # CPU seconds of descendants, alive or waited for

    @classmethod
    def measure(cls, cpu_clock: int) -> _Work:
        process = time.process_time() - time.thread_time()
        return cls(time.clock_gettime(cpu_clock), process, _bytes_moved(), _cpu_of_children(os.getpid()))

    def exceeds(self, before: _Work, seconds: float) -> bool:
        """Whether there was work in the `seconds` since `before`."""
        return (
            self.thread > before.thread
            or self.process - before.process > _BUSY * seconds
            or self.moved - before.moved > _BYTES_MOVED
            or self.children > before.children
        )


def _bytes_moved() -> int:
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/self/io").read_text().splitlines()[:2]
        return sum(int(line.split()[1]) for line in lines)
    return 0


def _cpu_of_children(parent: int) -> float:
    total, tasks = 0.0, list[str]()
    with contextlib.suppress(OSError):
        tasks = os.listdir(f"/proc/{parent}/task")
    for task in tasks:
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{parent}/task/{task}/children").read_text().split():
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
                total += _cpu_of_children(int(child))
    return total


def _report_and_exit(thread: int, stacks: Path, report: StallReport, who: str, seconds: float) -> None:
    """StallReport the stall, write the stacks of all threads, and end this process without waiting for long."""
    line = _current_line(sys._current_frames().get(thread))
    sentence = (
        f"{who} stood still for {seconds:.0f} s{line} and was ended ({STACKS_FILE}: where its threads stood)"
    )
    calls = partial(report, sentence), partial(_write_stacks, stacks, sentence)
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    deadline = time.monotonic() + _REPORT_SECONDS
    for reporting in threads:
        reporting.start()
    for reporting in threads:
        reporting.join(max(0.0, deadline - time.monotonic()))
    os._exit(WorkerLost.exit_code)


def _current_line(frame: FrameType | None) -> str:
    """The innermost line of this package that a thread executes."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] == "vaedist":
            return f" in {name}, line {frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return ""


def _write_stacks(path: Path, sentence: str) -> None:
    with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        file.write(f"{stamp} {os.uname().nodename}, process {os.getpid()}: {sentence}. Its threads:\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        file.write("\n")
