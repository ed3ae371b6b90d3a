"""What all tests share: real and built-in data, one Ray, and a guard over the global random generators."""

from __future__ import annotations

import os

# Before torch is imported anywhere: two slow cores serve best when no test opens more threads than it needs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import importlib.util
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault_matrix import note

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real images beside the repository; tests that use them are marked `shared`."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not (folder / "README.md").exists():
        pytest.skip("the real images are not here: ../shared/data beside the repository is missing")
    return folder


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed phantom images, 16x16 gray, two classes: 64 to train on, 32 to validate, 32 to test."""
    return pack_phantom(tmp_path_factory.mktemp("phantom") / "shards", size=16)


def pack_phantom(folder: Path, size: int) -> Path:
    """A small packed phantom of any size."""
    from vaedist.data.packing.pack import PackingConfig, pack
    from vaedist.data.sources import SourceSettings

    count = {"train": 64, "validate": 32, "test": 32}
    pack(
        PackingConfig(input="phantom", out=folder, size=size, settings=SourceSettings(size=size, count=count))
    )
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """The one Ray of this session: starting one takes tens of seconds. Tests that use it are marked `ray`."""
    # Only looked for: what a private cluster sets in the environment is read when Ray is loaded.
    if importlib.util.find_spec("ray") is None:
        if os.environ.get("CI"):
            pytest.fail("Ray must be there in continuous integration")
        pytest.skip("Ray is not installed")
    from vaedist.launchers.ray.cluster import cluster

    with cluster(cpus=4):
        yield


# Random generators --------------------------------------------------------------------------------------------


def _global_random_state() -> dict[str, bytes]:
    states = {"random": repr(hash(random.getstate())).encode()}
    if "numpy" in sys.modules:
        _, keys, position, *rest = sys.modules["numpy"].random.get_state(legacy=True)
        states["numpy.random"] = keys.tobytes() + repr((position, rest)).encode()
    if "torch" in sys.modules:
        states["torch"] = sys.modules["torch"].random.get_rng_state().numpy().tobytes()
    return states


@pytest.fixture(autouse=True)
def global_generators_untouched() -> Iterator[None]:
    """Randomness belongs to the sample: no test may find a global generator moved by what it ran."""
    before = _global_random_state()
    yield
    after = _global_random_state()
    moved = [name for name, state in before.items() if after[name] != state]
    assert not moved, f"moved a global random generator: {', '.join(moved)}"


# Rows of the fault matrix, and what a process said that failed a test -----------------------------------------


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    note(item, report)
    error = call.excinfo.value if call.excinfo else None
    if isinstance(error, subprocess.CalledProcessError | subprocess.TimeoutExpired):
        for name, said in (("output", error.stdout), ("standard error", error.stderr)):
            if said:
                text = said if isinstance(said, str) else said.decode(errors="replace")
                report.sections.append((f"{name} of the process", text[-_SAID:]))


_SAID = 8_000
"""Characters of a process's output that a report shows: its end."""


# Minutes by area, printed above pytest's last line --------------------------------------------------------------

_AREAS = ("set-up", "house", "variants", "Ray", "Slurm", "docs")
_seconds: dict[str, float] = defaultdict(float)


def _area(item_path: str, keywords: object) -> str:
    marks = keywords if isinstance(keywords, dict) else {}
    if "slurm" in marks:
        return "Slurm"
    if "ray" in marks:
        return "Ray"
    if "docs" in marks:
        return "docs"
    return "variants" if item_path.startswith(("tests/models/", "tests/nets/")) else "house"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[_area(report.nodeid, report.keywords)] += report.duration


def pytest_sessionstart() -> None:
    _seconds["set-up"] = float(os.environ.get("VAEDIST_SETUP_SECONDS", 0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    told = "  ".join(f"{area} {_seconds[area] / 60:.1f}" for area in _AREAS)
    terminalreporter.write_line(f"minutes by area: {told}")
