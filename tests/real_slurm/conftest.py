"""One test cluster for all tests of this folder; each test finds it idle, and leaves it so."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.real_slurm.cluster import KILL_WAIT, Slurm
from tests.real_slurm.work import SAVE, STEPS, Work
from tests.run_commands import small_job, train, write_job

ROOT = Path(__file__).resolve().parents[2]


def need_slurm() -> None:
    """Skip a test, with the reason, where no test cluster can be made; in continuous integration it must be."""
    reason = ""
    if os.getuid() != 0:
        reason = "the test cluster (tools/slurm_testbed) needs root"
    elif shutil.which("apt-get") is None:
        reason = "the test cluster (tools/slurm_testbed) needs Debian or Ubuntu"
    if reason and os.environ.get("CI"):
        pytest.fail(f"in continuous integration these tests must run: {reason}")
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    need_slurm()
    # A short path, for sockets, that other users may enter: some tests are another user.
    folder = Path(tempfile.mkdtemp(prefix="vd-slurm-"))
    folder.chmod(0o755)
    # Nodes have a /tmp of their own, in which they share what tests share.
    shared = [tmp_path_factory.getbasetemp(), ROOT, Path(sys.prefix)]
    options = [f"--shared={path}" for path in shared if path.is_relative_to("/tmp")]
    try:
        cluster = Slurm(folder, "--own-tmp", *options)
        yield cluster
    finally:
        Slurm.end(folder)


@pytest.fixture
def slurm(testbed: Slurm) -> Iterator[Slurm]:
    """The test cluster: two idle nodes, n1 and n2, with 4 CPUs and 2 (pretended) GPUs each."""
    yield testbed
    testbed.quiet()


@pytest.fixture
def work(slurm: Slurm, tmp_path: Path, phantom: Path) -> Iterator[Work]:
    made = Work(slurm, tmp_path, phantom)
    yield made
    slurm.quiet()
    deadline = time.monotonic() + KILL_WAIT + 5
    while found := [f"{node}: {one}" for node in slurm.nodes for one in slurm.left(node)]:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)


@pytest.fixture(scope="module")
def whole(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The same training without Slurm, by number of processes."""
    folder = tmp_path_factory.mktemp("whole")
    job = write_job(folder / "job.yaml", small_job(phantom, steps=STEPS, save_every=SAVE, validate_every=500))

    def of(workers: int) -> Path:
        run = folder / str(workers)
        if not run.exists():
            code, _, err = train(job, run, "--workers", str(workers), "--device=cpu")
            assert (code, err) == (0, "")
        return run

    return of
