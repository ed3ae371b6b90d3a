"""Silence that is counted in looks, stalls by ticks and by work, and the monitor process beside a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.run_commands import ROOT
from vaedist.distributed.liveness.silence import SilenceClock, heartbeat
from vaedist.distributed.liveness.stalls import StallDetector, StallMonitor, _Work


class Time:
    """A monotonic clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_silence_is_counted_by_source_until_it_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    time_ = Time(monkeypatch)
    clock = SilenceClock(0.5)
    for _ in range(4):
        time_.now += 0.5
        assert clock.look("a", "b") == 0.5
    clock.reset("b")
    time_.now += 0.5
    clock.look("a", "b")
    assert dict(clock.seconds) == {"a": 2.5, "b": 0.5}


def test_an_observer_that_was_stopped_itself_counts_two_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    time_ = Time(monkeypatch)
    clock = SilenceClock(0.5)
    time_.now += 3600
    assert clock.look("a") == 1.0


class Counts:
    """The other ranks' numbers of collectives."""

    def __init__(self, *others: int) -> None:
        self.others, self.published = others, -1

    def publish(self, collectives: int) -> None:
        self.published = collectives

    def counts(self) -> Sequence[int]:
        return (self.published, *self.others)


def first_stall(time_: Time, detector: StallDetector, seconds: int) -> float | None:
    """After how long without a tick the detector judges so; it looks once a second."""
    for _ in range(seconds):
        time_.now += 1.0
        if (stalled := detector.look()) is not None:
            return stalled
    return None


@pytest.mark.parametrize(
    ("others", "strict", "in_collective", "stalls_after"),
    [
        ((5,), True, False, 10),  # a step, and another rank waits for this one
        ((3,), True, False, 40),  # a step, and nobody waits
        ((2,), True, False, None),  # the other rank has entered fewer collectives: this one waits for it
        ((3,), True, True, None),  # all are in the same collective
        ((5,), True, True, 40),  # left alone in a collective that the others have passed
        ((5,), False, False, 40),  # outside of a step: by work alone, of which there is none
    ],
)
def test_who_has_stalled(
    others: tuple[int, ...],
    strict: bool,
    in_collective: bool,
    stalls_after: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    time_ = Time(monkeypatch)
    monkeypatch.setattr(_Work, "exceeds", lambda *_: False)
    monitor = StallMonitor()
    monitor.collectives = 3 - in_collective
    detector = StallDetector(monitor, 10.0, Counts(*others))
    with monitor.strict(strict):
        if in_collective:
            monitor.enter_collective()
        detector.look()
        assert first_stall(time_, detector, 100) == stalls_after


def test_work_counts_outside_of_a_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    time_ = Time(monkeypatch)
    monkeypatch.setattr(_Work, "exceeds", lambda *_: True)
    monitor = StallMonitor()
    detector = StallDetector(monitor, 10.0, None)
    detector.look()
    assert first_stall(time_, detector, 200) is None
    with monitor.strict():
        assert first_stall(time_, detector, 200) == 40


def test_a_step_may_last_ten_times_the_longest_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    time_ = Time(monkeypatch)
    monitor = StallMonitor()
    with monitor.strict():
        time_.now += 7
        monitor.tick()
        detector = StallDetector(monitor, 10.0, Counts(5))
        assert first_stall(time_, detector, 100) == 70


def test_heartbeats_start_at_once_and_outlive_a_failure() -> None:
    sent: list[int] = []

    def send() -> None:
        sent.append(1)
        raise OSError("the disk is full")

    with heartbeat(send):
        deadline = time.monotonic() + 30
        while len(sent) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)


WATCHED = """
import sys, time
from vaedist.distributed.liveness.silence import watchdog
with watchdog("rank 1 of 2", 1.5) as loaded:
    loaded()
    print("ready", flush=True)
    sys.stdin.read()
print("left")
"""


@pytest.mark.parametrize("stopped", [True, False])
def test_the_process_beside_a_rank_kills_it_when_it_is_stopped(stopped: bool, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WATCHED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "ready\n"
        if stopped:
            time.sleep(1.2)  # a beat has told that it runs
            rank.send_signal(signal.SIGSTOP)
            assert rank.wait(60) == -signal.SIGKILL
            assert rank.stderr is not None
            told = rank.stderr.read()
            assert told.startswith("vaedist: rank 1 of 2 did not answer for ") and told.count("\n") == 1
        else:
            time.sleep(3)
            out, err = rank.communicate("")
            assert (rank.returncode, out, err) == (0, "left\n", "")
