"""tools/bench asks its questions and writes its two files; what the numbers are is for people to look at."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run_commands import ROOT


def test_a_question_becomes_a_table(tmp_path: Path) -> None:
    command = [
        sys.executable,
        ROOT / "tools/bench",
        "--only",
        "commands",
        "--repeats",
        "1",
        "--out",
        tmp_path,
    ]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["machine"]["cores"] >= 1
    times = found["Start of the commands"]
    assert {"vaedist-train --help", "vaedist-evaluate --help", "import torch"} < set(times)
    assert all(len(seen) == 1 and seen[0] > 0 for seen in times.values())
    text = (tmp_path / "bench.md").read_text()
    assert "### Start of the commands" in text and "| python -c pass |" in text and "| 1.00 |" in text


@pytest.mark.slow
def test_the_questions_of_a_gpu_are_asked_without_one_in_small(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tools/bench", "gpu", "--device", "cpu", "--small", "--repeats", "1"]
    subprocess.run([*command, "--out", tmp_path], check=True, cwd=tmp_path, capture_output=True)
    found = json.loads((tmp_path / "bench.json").read_text())
    training = next(found[name] for name in found if name.startswith("Training vqvae_oasis"))
    assert set(training) > {"eager fp32", "bf16"} and all(seen[0] > 0 for seen in training.values())
    bounds = next(found[name] for name in found if name.startswith("What bounds vqvae_oasis"))
    assert 0 < bounds["eager fp32: model FLOP utilisation"][0] < 100
    assert 0 < bounds["eager fp32: device time in products and convolutions"][0] <= 100


def test_every_job_that_reads_images_is_asked_whether_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    side_of = importlib.import_module("benchmarks.waiting").side_of
    for job in (ROOT / "jobs").glob("*.yaml"):
        text = job.read_text()
        assert (side_of(text) is None) == ("tokenizer:" in text), job.name


def test_every_module_is_a_question() -> None:
    modules = {path.stem for path in (ROOT / "tools/benchmarks").glob("*.py")} - {"__init__", "common"}
    done = subprocess.run(
        [sys.executable, ROOT / "tools/bench", "--help"], check=True, capture_output=True, text=True
    )
    assert all(name in done.stdout for name in modules)
