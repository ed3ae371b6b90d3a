"""Runs without a fault, made once, which the others are compared with, and a clean stage for each test."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.stage import Stage


def _silent(name: str, value: object) -> None:
    """What the runs without a fault measure is nobody's row."""


@pytest.fixture
def stage(phantom: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> Iterator[Stage]:
    made = Stage(tmp_path, phantom, record_property)
    yield made
    made.is_clean()


@pytest.fixture(scope="session")
def whole(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """One process, no fault."""
    made = Stage(tmp_path_factory.mktemp("whole"), phantom, _silent)
    assert made.train("-q") == (0, "", "")
    made.is_clean()
    return made


@pytest.fixture(scope="session")
def whole_of_two(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Two processes, no fault."""
    made = Stage(tmp_path_factory.mktemp("whole-of-two"), phantom, _silent)
    assert made.train("--workers", "2", "-q") == (0, "", "")
    made.is_clean()
    return made


@pytest.fixture(scope="session")
def half(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """One process, killed at step 17: its last checkpoints are those of steps 10 and 15."""
    made = Stage(tmp_path_factory.mktemp("half"), phantom, _silent)
    with made.start("-q", hold=17) as training:
        made.wait_held(training)
        training.signal(signal.SIGKILL)
        training.end()
    made.release()
    assert made.saved() == ["step-000000010", "step-000000015"]
    return made
