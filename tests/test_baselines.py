"""tools/baselines compares what it trained itself; what it found on real images stands in docs/baselines.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.run_commands import ROOT, load_tool
from vaedist.data.packing.pack import PackingConfig, pack
from vaedist.data.sources import SourceSettings


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("baselines")


def test_both_sides_see_the_same_images_and_are_measured(tmp_path: Path) -> None:
    settings = SourceSettings(size=16, count={"train": 128, "validate": 32, "test": 32})
    pack(PackingConfig(input="phantom", out=tmp_path / "shards" / "mnist", size=16, settings=settings))
    command = [ROOT / "tools/baselines", "cvae_mnist", "vae_faces", "--seeds", "0", "--images", "128"]
    places = ["--data", tmp_path / "shards", "--runs", tmp_path / "runs", "--out", tmp_path / "docs"]
    done = subprocess.run(
        [sys.executable, *command, *places], check=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert f"vae_faces: left out: {tmp_path / 'shards/faces/index.json'} is not there" in done.stderr
    (line,) = (tmp_path / "docs" / "baselines.jsonl").read_text().splitlines()
    pair = json.loads(line)
    assert [side["name"] for side in pair["experiments"]] == ["earlier_cvae_mnist", "cvae_mnist"]
    steps = [
        json.loads((run / "finished.json").read_text())["step"]
        for run in sorted((tmp_path / "runs").iterdir())
    ]
    assert steps == [2, 1], "128 images in batches of 64 and of 128"
    table = (tmp_path / "docs" / "baselines.md").read_text()
    assert "128 images of `mnist` a run, 1 seed; 32 test images" in table
    assert "| PSNR dB | " in table and table.count("too few seeds") == table.count("\n| ") - 1


def test_a_side_wins_only_with_every_seed(tool: ModuleType) -> None:
    names = ["theirs", "ours"]
    assert tool._winner([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "max", names) == "ours"
    assert tool._winner([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "min", names) == "theirs"
    assert tool._winner([[1.0, 2.0, 4.0], [4.0, 5.0, 6.0]], "max", names) == "none"
    assert tool._winner([[1.0, 2.0], [4.0, 5.0]], "max", names) == "too few seeds"


def test_every_earlier_job_is_in_a_pair(tool: ModuleType) -> None:
    compared = {side.job for pair in tool.PAIRS.values() for side in pair.sides}
    earlier = {f"jobs/baselines/{path.name}" for path in (ROOT / "jobs/baselines").glob("*.yaml")}
    assert earlier < compared
    assert all((ROOT / job).exists() for job in compared)
