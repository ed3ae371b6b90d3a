"""Run folders: new ones, the record of each start, and logs in which each step appears once, whatever is killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from tests.runs.small_job import job
from vaedist.config.job import load_job
from vaedist.core.errors import UserError
from vaedist.runs.provenance import Change, read_starts
from vaedist.runs.resolved_job import resolved
from vaedist.runs.run_folder import RunFolder


def test_a_new_run_never_lands_in_an_old_one(tmp_path: Path) -> None:
    first = RunFolder.make(tmp_path / "runs" / "a")
    assert oct(first.path.stat().st_mode & 0o777) == "0o700"
    assert not first.has_run
    assert RunFolder.make(first.path, new_run=True).path == first.path, "there was no run in it yet"
    first.record_start(resolved(job()), step=None)
    assert first.has_run
    assert RunFolder.make(first.path).path == first.path
    assert [RunFolder.make(first.path, new_run=True).path.name for _ in range(2)] == ["a-2", "a-3"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make the run folder .*File exists"):
        RunFolder.make(tmp_path / "file")


def test_an_empty_folder_becomes_private_and_a_used_one_is_left_alone(tmp_path: Path) -> None:
    for name in ("empty", "used"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o750)
    (tmp_path / "used" / "note").touch()
    modes = [oct(RunFolder.make(tmp_path / name).path.stat().st_mode & 0o777) for name in ("empty", "used")]
    assert modes == ["0o700", "0o750"]


def test_the_saved_job_is_a_job_file_with_every_default(tmp_path: Path) -> None:
    run = RunFolder.make(tmp_path / "run")
    run.record_start(resolved(job()), step=None)
    content = yaml.safe_load((run.path / "job.yaml").read_text())
    assert content["model"]["beta"] == 1.0 and content["data"]["lanes"] == 12
    assert load_job(run.path / "job.yaml") == resolved(job())


def test_each_start_adds_its_provenance(tmp_path: Path) -> None:
    run = RunFolder.make(tmp_path / "run")
    run.record_start(
        resolved(job()), step=None, engine="local", world=2, attempt="a1", command=["vaedist-train", "my job"]
    )
    change = Change("train.optim.main.clip", None, 1.0)
    run.finish(100, "length", {"loss": 1.5, "psnr": float("inf")})
    assert run.finished() == {"step": 100, "reason": "length", "metrics": {"loss": 1.5, "psnr": None}}
    run.record_start(resolved(job()), step=100, changed=[change], engine="ray", world=1)
    assert run.finished() is None, "a run that goes on is not finished"
    first, second = read_starts(run.path)
    assert first["command"] == "vaedist-train 'my job'" and first["attempt"] == "a1"
    assert (first["start_step"], second["start_step"]) == (0, 100)
    assert (first["engine"], first["workers"], first["changed"]) == ("local", 2, [])
    assert second["changed"] == [{"key": "train.optim.main.clip", "old": None, "new": 1.0}]
    assert second["libraries"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    assert second["host"] == socket.gethostname() and second["vaedist"]
    (run.path / "provenance.json").write_text("[")
    with pytest.raises(UserError, match=r"provenance\.json is damaged"):
        read_starts(run.path)
    # A run goes on without it.
    for number in (1, 2):
        run.record_start(resolved(job()), step=100)
        assert [entry["start_step"] for entry in read_starts(run.path)] == [100]
        assert (run.path / f"damaged-{number}-provenance.json").read_text() == "["
        (run.path / "provenance.json").write_text("[")


# Cut --------------------------------------------------------------------------------------------------------------


def log_steps(run: RunFolder, steps: range, value: float) -> None:
    """Rows and events as an attempt writes them; a real attempt's purge mark included."""
    with run.metrics.open("a") as rows:
        rows.writelines(json.dumps({"step": step, "kind": "train", "loss": value}) + "\n" for step in steps)
    with SummaryWriter(str(run.tensorboard), purge_step=steps.start if steps.start > 1 else 0) as board:
        for step in steps:
            board.add_scalar("train/loss", value, step)
            board.add_image("samples", torch.full((1, 4, 4), step, dtype=torch.uint8), step)


def three_attempts(run: RunFolder) -> list[tuple[int, float]]:
    """The first dies at 9 with a checkpoint at 6; the second, at 8 without a new one; the third finishes."""
    expected = []
    for value, resumed, end in ((1.0, None, 9), (2.0, 6, 8), (3.0, 6, 10)):
        run.record_start(resolved(job()), step=resumed)
        start = resumed or 0
        log_steps(run, range(start + 1, end + 1), value)
        expected = [point for point in expected if point[0] <= start]
        expected += [(step, value) for step in range(start + 1, end + 1)]
    assert [step for step, _ in expected] == list(range(1, 11))
    return expected


def test_each_step_appears_once_after_two_deaths(tmp_path: Path) -> None:
    run = RunFolder.make(tmp_path / "run")
    expected = three_attempts(run)
    rows = [json.loads(row) for row in run.metrics.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == expected

    # Without purging: what the reader sees is what the files hold.
    board = EventAccumulator(
        str(run.tensorboard), size_guidance={"images": 0}, purge_orphaned_data=False
    ).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == expected
    assert [event.step for event in board.Images("samples")] == list(range(1, 11))
    assert len(list(run.tensorboard.iterdir())) == 2, "the second attempt's file held nothing that counts"


def test_a_clock_that_is_behind_does_not_mix_the_attempts(tmp_path: Path) -> None:
    run = RunFolder.make(tmp_path / "run")
    run.record_start(resolved(job()), step=None)
    log_steps(run, range(1, 4), 1.0)
    (events,) = run.tensorboard.iterdir()
    stamp = events.name.split(".")[3]
    assert len(stamp) == 10 and stamp.isdecimal()
    events.rename(
        events.with_name(events.name.replace(stamp, "9999999999"))
    )  # written on a node from the future
    run.record_start(resolved(job()), step=3)
    log_steps(run, range(4, 6), 2.0)
    for purges in (False, True):
        board = EventAccumulator(str(run.tensorboard), purge_orphaned_data=purges).Reload()
        assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_a_torn_tail_is_taken_away(tmp_path: Path) -> None:
    run = RunFolder.make(tmp_path / "run")
    run.record_start(resolved(job()), step=None)
    log_steps(run, range(1, 4), 1.0)
    with run.metrics.open("a") as rows:
        rows.write('{"step": 3, "kind": "validate"}\n{"step": 3, "los')
    (events,) = run.tensorboard.iterdir()
    whole = events.read_bytes()
    events.write_bytes(whole[:-5])
    run.record_start(resolved(job()), step=3)
    assert [json.loads(row)["step"] for row in run.metrics.read_text().splitlines()] == [1, 2, 3, 3]
    log_steps(run, range(4, 6), 2.0)
    board = EventAccumulator(str(run.tensorboard), purge_orphaned_data=False).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_a_run_killed_before_its_first_checkpoint_starts_with_empty_logs(tmp_path: Path) -> None:
    run = RunFolder.make(tmp_path / "run")
    run.record_start(resolved(job()), step=None)
    log_steps(run, range(4), 1.0)
    run.record_start(resolved(job()), step=None)
    assert run.metrics.read_bytes() == b"" and list(run.tensorboard.iterdir()) == []


def test_tensorboard_itself_shows_each_step_once(tmp_path: Path) -> None:
    """The program that people look at, asked over HTTP as the browser asks it."""
    run = RunFolder.make(tmp_path / "run")
    expected = three_attempts(run)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run.path), "--port", str(port)]
    query = urllib.parse.urlencode({"run": "tensorboard", "tag": "train/loss"})
    url = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?{query}"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=os.environ | {"PYTHONWARNINGS": "ignore"}, **quiet) as server:
        try:
            shown: list[list[float]] = []
            deadline = time.monotonic() + 120
            while len(shown) < len(expected) and time.monotonic() < deadline:
                time.sleep(0.5)
                try:
                    with urllib.request.urlopen(url, timeout=10) as answer:
                        shown = json.load(answer)
                except OSError:
                    assert server.poll() is None, "TensorBoard did not start"
        finally:
            server.terminate()
    assert [(step, value) for _, step, value in shown] == expected
