"""What a resumed run may change, the run folder's records, the cut, and how doors open a run."""

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

from vaedist.config.job import Job, Spec, load_job
from vaedist.config.settings import apply_overrides, parse
from vaedist.core.errors import UserError
from vaedist.data.format.index import DatasetInfo, Index, write_index
from vaedist.models.contract import build
from vaedist.runs.checkpoint import Best, Checkpoints
from vaedist.runs.checkpoint_manifest import LoadedCheckpoint
from vaedist.runs.open_run import open_run
from vaedist.runs.provenance import Change, read_starts
from vaedist.runs.resolved_job import resolved
from vaedist.runs.resume_rules import Differences, check_differences, check_resume, compare_jobs, data_section
from vaedist.runs.run_folder import RunFolder

BODY = {"kind": "mlp", "width": 8}
CONTENT: dict[str, Any] = {
    "model": {"kind": "vae", "encoder": BODY, "latent": 2},
    "train": {"steps": 100, "batch_size": 24},
}
DATA = {"identity": "ab" * 32, "shape": [1, 8, 8], "classes": ["ill", "well"], "path": "/shards"}


def job(*overrides: str) -> Job:
    return parse(Job, apply_overrides(CONTENT, overrides), where="test")


def differences(*overrides: str, saved: Job | None = None, data: dict[str, Any] | None = None) -> Differences:
    return compare_jobs(saved or job(), job(*overrides), DATA, DATA | (data or {}))


@pytest.fixture
def index(tmp_path: Path) -> Index:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_index(folder, {"train": []}, DatasetInfo((1, 8, 8), "png", ("ill", "well")), identity="ab" * 32)
    return Index.open(folder)


# Comparison -------------------------------------------------------------------------------------------------------


def test_the_same_job_differs_in_nothing_resolved_or_not() -> None:
    nothing = Differences((), (), ())
    assert differences() == nothing
    assert differences(saved=resolved(job())) == nothing
    assert resolved(resolved(job())) == resolved(job())
    # The largest divisor of 24 up to 16 is 12: saying so is no change, and nor is spelling out other defaults.
    assert resolved(job()).data.lanes == 12
    assert (
        differences("data.lanes=12", "train.weights=raw", "model.beta=1.0", "train.optim.main.eps=1e-8")
        == nothing
    )


@pytest.mark.parametrize(
    ("override", "kind", "key"),
    [
        ("train.steps=200", "free", "train.steps"),
        ("train.save_every=7", "free", "train.save_every"),
        ("data.cache=memory", "free", "data.cache"),
        ("data.path=/elsewhere", "free", "data.path"),
        ("name=other", "free", "name"),
        ("train.optim.main.learning_rate=0.01", "override", "train.optim.main.learning_rate"),
        (
            "train.optim.main.schedule={kind: constant, warmup: 5}",
            "override",
            "train.optim.main.schedule.warmup",
        ),
        ("train.ema_half_life=1000", "override", "train.ema_half_life"),
        ("train.monitor.metric=mse", "override", "train.monitor.metric"),
        ("train.precision=bf16", "override", "train.precision"),
        ("model.beta=4", "override", "model.beta"),
        ("model.beta={end: 2, steps: 10}", "override", "model.beta"),
        ("model.latent=3", "fixed", "model.latent"),
        ("model.encoder.width=9", "fixed", "model.encoder.width"),
        ("seed=1", "fixed", "seed"),
        ("train.batch_size=48", "fixed", "train.batch_size"),
        ("data.lanes=4", "fixed", "data.lanes"),
        ("data.train_split=test", "fixed", "data.train_split"),
        ("model.kind=vqvae", "fixed", "model.kind"),
    ],
)
def test_every_setting_is_free_overridable_or_fixed(override: str, kind: str, key: str) -> None:
    content = apply_overrides(CONTENT, [override])
    if key == "model.kind":
        content["model"] = {"kind": "vqvae"}
    found = compare_jobs(job(), parse(Job, content, where="test"), DATA, DATA)
    changes = {name: [change.key for change in getattr(found, name)] for name in found._fields}
    assert key in changes.pop(kind)
    if key == "train.ema_half_life":  # which weights are used follows from it
        assert found.override[1].key == "train.weights"
    elif key == "train.batch_size":  # 48 has the divisor 16
        assert found.fixed == (Change("data.lanes", 12, 16), Change("train.batch_size", 24, 48))
    else:
        assert len(getattr(found, kind)) == 1
    assert not any(changes.values())


def test_another_phase_takes_the_strictest_mark_below_it() -> None:
    found = differences("train.optim={main: {}, second: {learning_rate: 1}}")
    assert [change.key for change in found.override] == ["train.optim.second"] and not found.fixed


def test_other_data_are_never_the_same_run() -> None:
    found = differences(data={"identity": "cd" * 32, "path": "/copy"})
    assert found == Differences((), (), (Change("data identity", "ab" * 32, "cd" * 32),))
    assert len(differences(data={"shape": [3, 8, 8], "classes": []}).fixed) == 2


def test_refusals_name_the_key_both_values_and_the_ways_out(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        check_differences(differences("seed=5"), True, tmp_path)
    told = str(error.value)
    for part in (str(tmp_path), "seed was 0 and is now 5", "--new-run", f"init_from={tmp_path}"):
        assert part in told
    faster = differences("train.optim.main.learning_rate=0.01", "train.steps=7")
    with pytest.raises(UserError, match=r"learning_rate was 0.001 and is now 0.01.*--override.*--new-run"):
        check_differences(faster, False, tmp_path)
    check_differences(faster, True, tmp_path)
    check_differences(differences("train.steps=7"), False, tmp_path)


def test_resume_returns_what_changed_for_the_record(tmp_path: Path, index: Index) -> None:
    run = RunFolder.make(tmp_path / "run")
    assert check_resume(run.path, None, job(), index) == ()
    state = {"job": resolved(job()).model_dump(mode="json"), "data": data_section(index)}
    found = LoadedCheckpoint(state, 10, run.path)
    assert check_resume(run.path, found, job(), index) == ()
    with pytest.raises(UserError, match="override"):
        check_resume(run.path, found, job("train.optim.main.clip=1"), index)
    (change,) = check_resume(run.path, found, job("train.optim.main.clip=1"), index, override=True)
    assert change == Change("train.optim.main.clip", None, 1.0)


# Folder -----------------------------------------------------------------------------------------------------------


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


# Opening ----------------------------------------------------------------------------------------------------------


def trained(folder: Path, index: Index, *overrides: str) -> dict[str, dict[str, Any]]:
    """A run of two checkpoints, the first of them best; the states that were saved."""
    asked = resolved(job(*overrides))
    run = RunFolder.make(folder)
    run.record_start(asked, step=None)
    store = Checkpoints(run.path)
    states = {}
    for step in (5, 10):
        model = build(asked.model, index.spec, seed=step)
        average = build(asked.model, index.spec, seed=100 + step)
        if asked.train.precision == "fp64":
            model.double(), average.double()
        states[f"{step}"] = {
            "step": step,
            "model": model.state_dict(),
            "ema": average.state_dict() if asked.train.ema_half_life else None,
            "job": asked.model_dump(mode="json"),
            "data": data_section(index),
        }
        path = store.commit(states[f"{step}"], step, guard=lambda: None)
        if step == 5:
            store.mark_best(path, Best("loss", 1.0))
    return states


def equal(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)


def test_a_run_opens_at_its_best_and_a_checkpoint_at_itself(tmp_path: Path, index: Index) -> None:
    states = trained(tmp_path / "run", index, "train.ema_half_life=1000")
    run = open_run(tmp_path / "run")
    assert (run.step, run.weights, run.folder) == (5, "ema", tmp_path / "run")
    assert equal(run.model, states["5"]["ema"])
    assert not run.model.training and not any(parameter.requires_grad for parameter in run.model.parameters())
    assert run.spec == Spec(1, (8, 8), 2) and run.classes == ("ill", "well")
    assert run.data_identity == "ab" * 32 and run.data_path == str(index.folder)
    assert run.job == resolved(job("train.ema_half_life=1000"))
    assert run.model.reconstruct(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)).shape == (3, 1, 8, 8)

    last = open_run(tmp_path / "run" / "checkpoints" / "step-000000010", weights="raw")
    assert last.step == 10 and equal(last.model, states["10"]["model"])

    moved = tmp_path / "moved"
    last.checkpoint.rename(moved)
    assert open_run(moved).folder == moved


def test_weights_follow_the_jobs_rule_and_precision(tmp_path: Path, index: Index) -> None:
    states = trained(tmp_path / "run", index, "train.precision=fp64")
    run = open_run(tmp_path / "run")
    assert run.weights == "raw" and equal(run.model, states["5"]["model"])
    assert next(run.model.parameters()).dtype == torch.float64
    with pytest.raises(UserError, match="not averaged"):
        open_run(tmp_path / "run", weights="ema")


def test_a_checkpoint_of_another_making_is_one_sentence(tmp_path: Path, index: Index) -> None:
    states = trained(tmp_path / "run", index)
    store = Checkpoints(tmp_path / "run")
    for step, change, told in (
        (20, {"data": {}}, "lacks what vaedist-train writes"),
        (30, {"model": {}}, "do not fit its model 'vae'"),
        (40, {"model": {"x": torch.zeros(1)}}, "do not fit its model 'vae'"),
        (50, {"job": states["5"]["job"] | {"model": {"kind": "nothing"}}}, "unknown model kind 'nothing'"),
        (60, {"job": states["5"]["job"] | {"surprise": 1}}, "unknown key 'surprise'"),
    ):
        path = store.commit(states["5"] | change, step, guard=lambda: None)
        with pytest.raises(UserError, match=told):
            open_run(path)
