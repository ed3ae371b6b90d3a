"""One test cluster for all tests of this folder; each test finds it idle, and leaves it so."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real_slurm.cluster import Slurm

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
