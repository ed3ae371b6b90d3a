"""What a job leaves to the machine: cache and readers by rule, told in the start-up summary, and each overridden."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.run_commands import curve, small_job
from vaedist.data.loading.cache import Cache, copy_to_device
from vaedist.training.loader_settings import LARGEST, LoaderSettings, choose_cache, choose_readers
from vaedist.training.loop import fit

MIB = 1 << 20


@pytest.mark.parametrize(
    ("count", "sample_bytes", "to_read", "free", "cache", "why"),
    [
        (1000, MIB, 1001, 8 << 30, "memory", " (1,000 MiB)"),
        (1000, MIB, 1000, 8 << 30, "none", " (no image is read twice)"),
        (1000, MIB, 10**9, 3 << 30, "none", " (1,000 MiB: more than a quarter of the free memory)"),
        (2048, MIB, 10**9, 64 << 30, "memory", " (2,048 MiB)"),
        (2049, MIB, 10**9, 64 << 30, "none", " (2,049 MiB: more than are cached unasked)"),
    ],
)
def test_the_cache_is_for_what_is_read_again_and_small(
    count: int, sample_bytes: int, to_read: int, free: int, cache: str, why: str
) -> None:
    assert choose_cache(count, sample_bytes, to_read, free) == (cache, why)
    assert LARGEST == 2048 * MIB


@pytest.mark.parametrize(
    ("cache", "device", "threads", "readers"),
    [
        ("none", "cpu", 16, 1),
        ("memory", "cpu", 16, 0),
        ("memory", "cuda", 16, 1),
        ("device", "cuda", 16, 0),
        ("none", "cuda", 1, 1),
        ("none", "cuda", 4, 3),
        ("none", "cuda", 64, 8),
    ],
)
def test_readers_have_the_cores_that_a_gpu_leaves(
    cache: Cache, device: str, threads: int, readers: int
) -> None:
    assert choose_readers(cache, torch.device(device), threads) == readers


@pytest.mark.parametrize(
    ("steps", "given", "told"),
    [
        # 64 images, 8 a step: the ninth step reads some again.
        (9, {}, "cache memory (1 MiB), read by the loop itself"),
        (8, {}, "cache none (no image is read twice), 1 reader"),
        (9, {"cache": "none", "workers": 0}, "cache none, read by the loop itself"),
        (8, {"cache": "memory", "workers": 3}, "cache memory, 3 readers"),
        (8, {"cache": "device"}, "cache device, read by the loop itself"),
    ],
)
def test_a_start_tells_what_it_does(
    steps: int,
    given: dict[str, object],
    told: str,
    phantom: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = small_job(phantom, steps=steps)
    job = job.model_copy(update={"data": job.data.model_copy(update=given)})
    fit(job, tmp_path / "run")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reads ")]
    assert line.split(maxsplit=1)[1] == told


def test_a_cache_that_does_not_fit_is_not_told_as_one(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vaedist.data.loading.cache.available_memory", lambda: 1000)
    job = small_job(phantom, steps=2)
    job = job.model_copy(update={"data": job.data.model_copy(update={"cache": "memory"})})
    fit(job, tmp_path / "run")
    assert "reads   cache none (no room in memory), 1 reader\n" in capsys.readouterr().out


@pytest.mark.parametrize("binarise", ["none", "static", "threshold", "dynamic"])
def test_the_choice_changes_no_number(phantom: Path, tmp_path: Path, binarise: str) -> None:
    curves = []
    for cache in ("auto", "none", "device"):
        job = small_job(phantom, steps=12)
        read = {"cache": cache, "binarise": binarise}
        job = job.model_copy(update={"data": job.data.model_copy(update=read)})
        fit(job, tmp_path / cache)
        curves.append(curve(tmp_path / cache))
    assert curves[0] == curves[1] == curves[2]


def test_a_gpu_without_room_leaves_them_in_the_nodes_memory(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * MIB, 9 * MIB))
    assert copy_to_device(np.zeros((2, 1, 1024, 1024), np.uint8), torch.device("cuda")) is None
    assert "cache: device needs 2.0 MiB and 1.5 MiB of the GPU may be used for it" in caplog.text
    asked = LoaderSettings("device", "", {"none": 1, "memory": 0, "device": 0})
    assert asked.describe("memory") == "cache memory (no room on the device), read by the loop itself"
    assert asked.describe("none") == "cache none (no room in memory), 1 reader"
