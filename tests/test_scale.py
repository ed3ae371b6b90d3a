"""tools/scale: the laws of its model, a published table within 10 %, and its inputs measured of a real job."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.run_commands import ROOT, load_tool, small_job, write_job


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("scale")


@pytest.fixture
def job(tool: ModuleType) -> Any:
    """A step of 64 images in 100 ms, nothing fixed, no spread, and hardly any gradients."""
    return tool.Inputs("job", 64, 0.0, 0.1 / 64, 0.0, 4)


@pytest.fixture
def cluster(tool: ModuleType) -> Any:
    return tool.Cluster(
        per_node=4, inside=1e11, inside_latency=0.0, between=1e10, between_latency=0.0, disk=1e9
    )


def test_one_device_takes_its_own_step(tool: ModuleType, job: Any, cluster: Any) -> None:
    found = tool.predict(replace(job, spread=0.3), 1, cluster)
    assert found.step == pytest.approx(0.1)
    assert found.images == pytest.approx(640)
    assert (found.efficiency, found.wait, found.limit) == (pytest.approx(1), 0, "")


def test_without_costs_it_scales_as_the_devices(tool: ModuleType, job: Any, cluster: Any) -> None:
    for weak in (False, True):
        found = [tool.predict(job, count, cluster, weak=weak).images for count in (1, 2, 16, 64)]
        assert found == pytest.approx([640, 1280, 16 * 640, 64 * 640], rel=1e-4)


def test_a_ring_moves_twice_the_bytes_less_one_share(tool: ModuleType, cluster: Any) -> None:
    assert tool.all_reduce(4e9, 1, cluster) == 0
    assert tool.all_reduce(4e9, 4, cluster) == pytest.approx(2 * 3 / 4 * 4e9 / 1e11)
    assert tool.all_reduce(4e9, 8, cluster) == pytest.approx(2 * 3 / 4 * 4e9 / 1e11 + 2 * 1 / 2 * 4e9 / 1e10)
    slow = replace(cluster, between_latency=1e-3)
    hops = [tool.all_reduce(0, nodes * 4, slow) for nodes in (1, 2, 4, 256)]
    assert hops == pytest.approx([0, 2e-3, 4e-3, 16e-3])


def test_the_slowest_of_several_is_that_of_order_statistics(tool: ModuleType) -> None:
    """Against the exact expectations: 0, 1/sqrt(pi), and the tables of Teichroew (1956)."""
    for count, exact in ((1, 0.0), (2, 1 / math.sqrt(math.pi)), (8, 1.42360), (20, 1.86748)):
        assert tool.largest(count) == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({"fixed": 0.05}, "its fixed cost: too few images a rank"),
        ({"spread": 0.5}, "waiting for the slowest rank"),
        ({"gradient": 10**9}, "averaging gradients"),
        ({"readers": 300.0}, "the rank's own readers"),
        ({"stored": 1e6}, "the shared disk"),
        ({"state": 10**12, "save_every": 1}, "writing checkpoints"),
    ],
)
def test_it_says_what_limits(
    tool: ModuleType, job: Any, cluster: Any, change: dict[str, float], limit: str
) -> None:
    found = tool.predict(replace(job, **change), 8, cluster)
    assert found.limit == limit
    assert found.efficiency < 0.9
    assert (found.wait > 0) == (limit in ("the rank's own readers", "the shared disk"))


def test_a_disk_feeds_so_many_images_and_no_more(tool: ModuleType, job: Any, cluster: Any) -> None:
    hungry = replace(job, stored=1e6)
    assert tool.predict(hungry, 64, cluster).images == pytest.approx(1000)
    assert tool.predict(hungry, 64, cluster).wait == pytest.approx(1 - 1000 / (64 * 640), rel=1e-3)


def test_published_times_are_met_within_a_tenth(tool: ModuleType) -> None:
    errors = [float(found) for found in re.findall(r"([+-][\d.]+)%", tool.published())]
    assert len(errors) == 6
    assert all(abs(error) < 10 for error in errors), errors


def test_a_job_is_measured_and_kept(tmp_path: Path, phantom: Path) -> None:
    job = write_job(tmp_path / "job.yaml", small_job(phantom, "vqvae", steps=2))
    inputs = tmp_path / "inputs.json"
    run = lambda *given: subprocess.run(  # noqa: E731
        [sys.executable, ROOT / "tools/scale", *given], cwd=tmp_path, capture_output=True, text=True
    )
    measured = run(job, "--steps", "3", "--save", inputs)
    assert (measured.returncode, measured.stderr) == (0, "")
    kept = json.loads(inputs.read_text())
    assert kept["batch"] == 8 and kept["gradient"] % 4 == 0 < kept["gradient"]
    # On a busy machine a small batch may take as long as the whole one: an image then costs nothing.
    assert kept["image"] >= 0 and kept["fixed"] + kept["image"] > 0
    assert "| 8 | 1 |" in measured.stdout
    assert "| 16 | | | | | | a batch of 8 has no image for every rank |" in measured.stdout
    again = run("--inputs", inputs)
    assert again.stdout == measured.stdout
    wrong = run(tmp_path / "none.yaml")
    assert wrong.returncode == 2 and wrong.stderr.startswith("tools/scale: error: ")
    assert wrong.stderr.count("\n") == 1
