"""What a run writes while it trains can be read back at any moment, by machines and by people."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vaedist.config.job import Job
from vaedist.config.settings import parse
from vaedist.runs.resolved_job import resolved
from vaedist.runs.run_folder import RunFolder
from vaedist.training.run_log import RunLog, SilentLog, draw_curves, read_metrics


def a_job() -> Job:
    content = {
        "model": {"kind": "vae", "encoder": {"kind": "mlp", "width": 8}, "latent": 2},
        "train": {"steps": 100, "batch_size": 32, "optim": {"main": {"learning_rate": 0.25}}},
    }
    return resolved(parse(Job, content, where="test"))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder.make(tmp_path / "run")
    run.record_start(a_job(), step=None)
    return run


def board(run: RunFolder) -> EventAccumulator:
    return EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_rows_and_tensorboard_hold_the_same_numbers(run: RunFolder) -> None:
    log = RunLog(run, a_job(), total_steps=100, console=io.StringIO())
    log.train(20, {"loss": 0.1, "gradient_norm": 3.0}, images=640, epoch=0.5, wait_seconds=0.0)
    log.validate(20, {"loss": 0.2}, best=True)
    log.images(20, "samples", np.zeros((4, 6, 1), np.uint8))
    log.images(20, "flat", np.zeros((4, 6), np.uint8))
    log.train(40, {"loss": math.nan, "gradient_norm": math.inf}, images=1280, epoch=1.0, wait_seconds=0.0)

    # Before closing: whoever looks now sees it all.
    rows = read_metrics(run.metrics)
    assert [(row["step"], row["kind"], row["epoch"]) for row in rows] == [
        (20, "train", 0.5),
        (20, "validate", 0.5),
        (40, "train", 1.0),
    ]
    assert (rows[0]["loss"], rows[1]["loss"], rows[2]["loss"], rows[2]["gradient_norm"]) == (
        0.1,
        0.2,
        None,
        None,
    )
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["time"]) for row in rows)
    seen = board(run)
    assert {
        "train/loss",
        "train/gradient_norm",
        "validate/loss",
        "speed/images_per_second",
        "speed/data_wait",
    } == {*seen.Tags()["scalars"]}
    (first, second) = seen.Scalars("train/loss")
    assert (first.step, round(first.value, 6)) == (20, 0.1) and second.step == 40 and math.isnan(second.value)
    assert seen.Images("samples")[0].width == seen.Images("flat")[0].width == 6
    log.close()


def test_speed_counts_training_time_alone(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("vaedist.training.run_log.time.monotonic", lambda: now[0])
    console = io.StringIO()
    log = RunLog(run, a_job(), total_steps=3600 + 20, start_step=10, console=console)
    now[0] += 10
    log.train(20, {"loss": 1.0}, images=640, epoch=0.5, wait_seconds=2.5)
    with log.pause():
        now[0] += 1000
    now[0] += 2
    log.train(40, {"loss": 1.0}, images=1280, epoch=1.0, wait_seconds=2.6)
    first, second = read_metrics(run.metrics)
    assert first["images_per_second"] == pytest.approx(32)  # 10 steps of 32 images, from step 10 on
    assert first["data_wait"] == pytest.approx(0.25)
    assert second["images_per_second"] == pytest.approx(320)
    assert second["data_wait"] == pytest.approx(0.05)
    told = console.getvalue().splitlines()
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d  step 20/3620  epoch 0\.50  loss 1  32 images/s  1:00:00 left", told[0]
    )
    log.close()


def test_plain_lines_for_a_batch_log(run: RunFolder) -> None:
    console = io.StringIO()
    log = RunLog(run, a_job(), total_steps=100, console=console)
    log.summary({"data": "here", "parameters": 12})
    log.message("something to know")
    log.validate(20, {"loss": 0.25, "mse": 0.125}, best=True)
    log.close()
    lines = console.getvalue().splitlines()
    assert lines[:3] == ["data        here", "parameters  12", "something to know"]
    assert lines[3].endswith("step 20  validation  loss 0.25  mse 0.125  (best so far)")


def test_quiet_says_nothing_and_writes_all_the_same(
    run: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(run, a_job(), total_steps=100, quiet=True)
    log.summary({"a": 1})
    log.train(20, {"loss": 0.1}, images=640, epoch=0.5, wait_seconds=0.0)
    log.close()
    assert capfd.readouterr() == ("", "")
    assert len(read_metrics(run.metrics)) == 1


def test_every_other_rank_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    silent = SilentLog()
    silent.summary({"a": 1})
    silent.message("x")
    silent.train(1, {"loss": 1.0}, images=1, epoch=0.0, wait_seconds=0.0)
    silent.validate(1, {"loss": 1.0})
    silent.images(1, "x", np.zeros((2, 2), np.uint8))
    with silent.pause():
        pass
    silent.close()
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    assert {name for name in vars(SilentLog) if name[0] != "_"} <= set(vars(RunLog)), (
        "RunLog leaves something silent"
    )


def test_the_job_is_shown_as_hparams_once(run: RunFolder) -> None:
    RunLog(run, a_job(), total_steps=100, quiet=True).close()
    run.record_start(a_job(), step=50)
    RunLog(run, a_job(), total_steps=100, start_step=50, quiet=True).close()
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = board(run).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    shown = HParamsPluginData.FromString(content).session_start_info.hparams
    assert shown["train.optim.main.learning_rate"].number_value == 0.25
    assert shown["model.kind"].string_value == "vae" and shown["data.lanes"].number_value == 16
    held = b"".join(path.read_bytes() for path in run.tensorboard.iterdir())
    assert held.count(b"_hparams_/session_start_info") == 1


ATTEMPT = """
import sys, time
from pathlib import Path
from tests.training.test_run_log import a_job
from vaedist.training.run_log import RunLog
from vaedist.runs.run_folder import RunFolder
run = RunFolder.make(Path(sys.argv[1]))
log = RunLog(run, a_job(), total_steps=100)
for step in range(10, 60, 10):
    log.train(step, {"loss": 100.0 / step}, images=32 * step, epoch=0.1 * step, wait_seconds=0.0)
if sys.argv[2] == "dies":
    print("logged", flush=True)
    time.sleep(600)
log.close()
"""


def test_a_killed_process_loses_nothing_that_it_logged(run: RunFolder, repository: Path) -> None:
    command = [sys.executable, "-c", ATTEMPT, str(run.path), "dies"]
    with subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line == "logged\n" for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    assert [row["step"] for row in read_metrics(run.metrics)] == [10, 20, 30, 40, 50]
    assert [event.step for event in board(run).Scalars("train/loss")] == [10, 20, 30, 40, 50]


def test_a_terminal_gets_a_bar_with_loss_and_speed(run: RunFolder, repository: Path) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "120", "LINES": "40"}
    command = [sys.executable, "-c", ATTEMPT, str(run.path), "ends"]
    with subprocess.Popen(command, cwd=repository, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the terminal's other side is closed
                break
            if not piece:
                break
            shown += piece
        assert process.wait() == 0, shown.decode()
    os.close(ours)
    text = shown.decode()
    assert re.search(r"50/100 .*loss 2, [\d.e+]+ images/s", text), text
    assert "step 50/100" not in text, "plain lines on a terminal"


FULL = """
import sys
from pathlib import Path
from tests.training.test_run_log import a_job
from vaedist.core.errors import UserError
from vaedist.training.run_log import RunLog
from vaedist.runs.run_folder import RunFolder
log = RunLog(RunFolder.make(Path(sys.argv[1])), a_job(), total_steps=10**6, quiet=True)
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    for step in range(1, 100_000):
        log.train(step, {"loss": 1.0}, images=step, epoch=1.0, wait_seconds=0.0)
except UserError as error:
    print(error)
"""


def test_a_full_disk_is_one_sentence(run: RunFolder, repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(run.path)], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"no room to write the log in {run.path}"), done.stderr


def rows(run: RunFolder, *content: dict[str, Any]) -> None:
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in content))


def test_curves_show_what_there_is(run: RunFolder) -> None:
    target = run.figures / "curves.png"
    rows(run)
    draw_curves(run.metrics, target)
    assert not target.exists(), "an empty picture"
    steps = [{"step": step, "kind": "train", "loss": 9.0 / step} for step in range(1, 9)]
    rows(run, *steps, {"step": 8, "kind": "validate", "loss": None})
    draw_curves(run.metrics, target)
    narrow = matplotlib.image.imread(target)
    more = {"learning_rate": 0.1, "codes_used": 12.0, "perplexity": 8.5}
    rows(run, *({**row, **more} for row in steps), {"step": 8, "kind": "validate", "loss": -3.0})
    with run.metrics.open("a") as file:
        file.write('{"step": 9, "ki')  # being written right now
    draw_curves(run.metrics, target)
    wide = matplotlib.image.imread(target)
    assert wide.shape[1] == pytest.approx(3 * narrow.shape[1], rel=0.01), "three panels instead of one"
    assert wide.std() > 0
    assert [path.name for path in run.figures.iterdir()] == ["curves.png"]


def test_closing_draws_the_curves(run: RunFolder) -> None:
    log = RunLog(run, a_job(), total_steps=100, quiet=True)
    log.train(20, {"loss": 0.5}, images=640, epoch=0.5, wait_seconds=0.0)
    log.close()
    assert (run.figures / "curves.png").exists()
