"""What commit 369db07 wrote: today's code opens it, goes on with it, and finds the same numbers.

`tests/made_at_369db07/make.py` says what is there and made all of it, at that commit.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vaedist
from vaedist import evaluate, export, launch, sample, shard, train, tune

FILES = Path(__file__).parent / "made_at_369db07"
KINDS = ("vae", "infovae", "vqvae", "gan", "vaegan", "pixelcnn", "transformer")
STEPS, STOPPED = 12, 6
CLOCK = {"time", "images_per_second", "data_wait"}
TEXT = {".json", ".jsonl", ".yaml", ".csv", ".log", ".out", ".sbatch"}
kind = pytest.mark.parametrize("kind", KINDS)


def _maker() -> ModuleType:
    """make.py: what it asked for then is asked for again."""
    spec = importlib.util.spec_from_file_location("make_at_369db07", FILES / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = _maker()


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all of it, whose texts name the place where it is now; also the working folder."""
    root = tmp_path / "made"
    shutil.copytree(FILES, root, ignore=shutil.ignore_patterns("__pycache__", "make.py"))
    for name, target in told("links").items():
        (root / name).symlink_to(target)
    for path in root.rglob("*"):
        if path.is_dir():
            path.chmod(0o700)  # as it was made; a checkout may let a group write
        elif path.suffix in TEXT and not path.is_symlink() and not path.is_relative_to(root / "told"):
            content = path.read_text()
            if str(maker.ROOT) in content:
                path.write_text(content.replace(str(maker.ROOT), str(root)))
    for name in ("VAEDIST_DATA", "VAEDIST_SITE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MADE", str(root))
    monkeypatch.chdir(root)
    return root


def told(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FILES / "told" / f"{name}.json").read_text())
    return content


def same(mine: Any, theirs: Any, where: str, rel: float = 1e-7) -> None:
    """Digits, not bits: another processor adds in another order. A measure of samples is one of fp32 features."""
    if isinstance(theirs, dict):
        assert mine.keys() == theirs.keys(), where
        for name in theirs:
            loose = "[" in name or name in ("kid", "fid")
            same(mine[name], theirs[name], f"{where}: {name}", 1e-3 if loose else rel)
    elif isinstance(theirs, list):
        assert len(mine) == len(theirs), where
        for number, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            same(one, other, f"{where}[{number}]", rel)
    elif isinstance(theirs, float) and not math.isnan(theirs):
        assert mine == pytest.approx(theirs, rel=rel, abs=1e-10), where
    elif not isinstance(theirs, float):
        assert mine == theirs, where


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def command(made: Path, name: str) -> list[str]:
    """Of vaedist-train, as it was typed."""
    return [str(made / "jobs" / f"{name}.yaml"), "--run-dir", str(made / "runs" / name), "--device", "cpu"]


def layout(value: Any) -> Any:
    """A state without its numbers: names in their order, kinds of values, shapes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape)
    if isinstance(value, dict):
        return [(name, layout(inner)) for name, inner in value.items()]
    return [layout(inner) for inner in value] if isinstance(value, list | tuple) else type(value).__name__


def state(run: Path, step: int) -> dict[str, Any]:
    """What a checkpoint holds, as torch reads it."""
    content: dict[str, Any] = torch.load(
        run / "checkpoints" / f"step-{step:09d}" / "state.pt", weights_only=True
    )
    return content


def files_of(run: Path) -> set[str]:
    """Names in a run folder."""
    return {path.name for path in run.iterdir()}


def numbers_of(run: Path, stored: str) -> None:
    """Samples, latents and reconstructions are those of then."""
    mine = maker.outputs(vaedist.load(run), maker.pictures())
    with np.load(FILES / "told" / f"{stored}.npz") as theirs:
        assert sorted(mine) == sorted(theirs.files)
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-6, atol=1e-9, err_msg=name)


# Runs ---------------------------------------------------------------------------------------------------------


@kind
def test_a_run_goes_on_to_its_end_with_the_numbers_of_then(
    kind: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made / "runs" / kind
    before, job, files = maker.rows(run), (run / "job.yaml").read_bytes(), files_of(run)
    then, best = state(run, STOPPED), json.loads((run / "best.json").read_text())
    assert before[-1]["step"] == STOPPED and not (run / "finished.json").exists()
    assert train.main(command(made, kind)) == 0
    assert "resumed after step 6" in capsys.readouterr().out
    rows, expected = maker.rows(run), told(kind)
    assert rows[: len(before)] == before, "what was there stays"
    assert [(row["kind"], row["step"]) for row in rows] == [
        (row["kind"], row["step"]) for row in expected["rows"]
    ]
    same(without_clock(rows), without_clock(expected["rows"]), "metrics.jsonl")
    first, second = json.loads((run / "provenance.json").read_text())
    assert (first["start_step"], second["start_step"], second["changed"]) == (0, STOPPED, [])
    assert (second["start"]["how"], second["start"]["checkpoint"]) == ("resume", "step-000000006")
    assert json.loads((run / "finished.json").read_text())["step"] == STEPS
    # What is written is laid out as then.
    assert (run / "job.yaml").read_bytes() == job
    assert files_of(run) == files | {"finished.json"}
    now = state(run, STEPS)
    assert now["job"] == then["job"]
    assert now["data"] | {"path": ""} == then["data"] | {"path": ""}
    for part in then.keys() | now.keys():
        if part not in ("progress", "collapse"):  # None, or a number, as it comes
            assert layout(now[part]) == layout(then[part]), part
    assert list(now) == list(then) and now["progress"].keys() == then["progress"].keys()
    assert list(json.loads((run / "best.json").read_text())) == list(best)
    assert first.keys() == second.keys()
    if expected["machine"] == maker.machine():  # the same processor and torch: bit for bit
        last = run / "checkpoints" / f"step-{STEPS:09d}"
        for which, digest in expected["weights"].items():
            assert maker.digest(vaedist.load(last, weights=which).run.model.state_dict()) == digest, which
    # The same command again finds nothing to do.
    assert train.main(command(made, kind)) == 0
    assert "nothing left to do: this run finished at step 12" in capsys.readouterr().out
    assert len(maker.rows(run)) == len(rows)


@kind
def test_a_stopped_run_opens_with_the_numbers_of_then(kind: str, made: Path) -> None:
    opened = vaedist.load(made / "runs" / kind)
    assert (opened.kind, opened.shape, opened.classes) == (kind, (1, 16, 16), ("old", "young"))
    assert opened.run.step == (4 if kind == "vae" else STOPPED)
    numbers_of(made / "runs" / kind, kind)
    newest = vaedist.load(made / "runs" / kind / "checkpoints" / "step-000000006", weights="raw")
    assert newest.run.step == STOPPED


@kind
def test_a_stopped_run_is_evaluated_as_then(kind: str, made: Path) -> None:
    run = made / "runs" / kind
    data = ["--data", str(made / "shards"), "--device", "cpu", "-q"]
    assert evaluate.main([str(run), *maker.asked(kind), *data]) == 0
    found = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())
    same({part: found.get(part) for part in ("terms", "metrics")}, told(kind)["evaluation"], kind, 1e-5)


@kind
def test_a_stopped_run_is_sampled_and_exported(
    kind: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(made / "runs" / kind)
    for number, picture in enumerate(maker.pictures()[:2]):
        Image.fromarray(picture[0].numpy()).save(f"{number}.png")
    classes = ["--class", "old"] if kind == "vae" else []
    draws, sees, between = kind != "vqvae", kind != "gan", kind in ("vae", "infovae", "vaegan")
    asked = {
        "samples": (["--num-samples", "4"], draws),
        "reconstructed": (["--reconstruct", "0.png", "1.png", *classes], sees),
        "between": (["--interpolate", "0.png", "1.png", "--frames", "3", *classes], between),
    }
    for name, (words, possible) in asked.items():
        code = sample.main([run, *words, "--out", f"{name}.png", "--device", "cpu", "-q"])
        assert (code, Path(f"{name}.png").exists()) == (0 if possible else 2, possible), name
        assert ("is not defined" in capsys.readouterr().err) == (not possible)
    if kind == "vae":
        gmm = ["--sampler", "gmm", "--data", str(made / "shards"), "--num-samples", "4"]
        assert sample.main([run, *gmm, "--out", "gmm.png", "--device", "cpu", "-q"]) == 0
    assert sample.main([run, "--info-only"]) == 0
    assert export.main([run, "exported", "--no-programs", "-q"]) == 0
    numbers_of(Path("exported"), kind)


# Data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shards", "foreign"])
def test_a_packed_folder_is_sound(name: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard.main([str(made / name), "--verify"]) == 0
    assert "every byte and image is as it was packed" in capsys.readouterr().out


def test_packing_again_makes_the_same_bytes(made: Path) -> None:
    assert shard.main([*maker.PACK, "--out", "again", "-q"]) == 0
    expected = told("shards")
    for folder in ("again", "shards"):
        found = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in Path(folder).iterdir()
            if path.is_file() and path.suffix != ".png"
        }
        assert found == expected, folder


def test_indexing_the_tars_of_others_again_makes_the_same_index(made: Path) -> None:
    maker.foreign(made / "again")
    assert shard.main([str(made / "again"), "--index", "-q"]) == 0
    for path in (made / "foreign").iterdir():
        if path.suffix != ".png":
            assert (made / "again" / path.name).read_bytes() == path.read_bytes(), path.name


# Launches, searches, exports ------------------------------------------------------------------------------------


def test_a_launch_is_told_of(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(made / "launches" / "tiny")
    assert launch.main(["status", folder]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == [folder]
    assert lines[1] == ["LINK", "RUN", "JOB", "STATE", "STEP", "RESTARTS", "NOTE"]
    assert [(line[0], line[1], line[3]) for line in lines[2:]] == [
        ("train", "tiny", "COMPLETED"),
        ("evaluate", "tiny", "COMPLETED"),
        ("sample", "tiny", "COMPLETED"),
    ]
    assert lines[2][4] == "4/4"
    assert launch.main(["logs", folder, "--link", "train", "-n", "1"]) == 0
    assert capsys.readouterr().out == f"run folder: {made}/launched/tiny\n"
    assert launch.main(["cancel", folder]) == 0
    assert capsys.readouterr().out == "nothing to cancel: all have ended\n"
    copy = made / "launches" / "tiny" / "jobs" / "tiny.yaml"
    assert train.main([str(copy), f"data.path={made}/shards", "--run-dir", str(made / "launched/tiny")]) == 0
    assert "nothing left to do" in capsys.readouterr().out


def search(made: Path, *more: str) -> list[str]:
    """Of vaedist-tune, as it was typed."""
    words = ["--space", str(made / "jobs/space.yaml"), "--run-dir", str(made / "search")]
    return [*words, "--device", "cpu", "--max-parallel", "1", *more]


def test_a_search_has_nothing_left_to_do(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = made / "search"
    table, record = (place / "results.csv").read_bytes(), (place / "trials.jsonl").read_bytes()
    assert tune.main(search(made)) == 0
    out = capsys.readouterr().out
    assert "Ray" not in out and "starts" not in out
    assert f"best: {place}/best -> trials/000" in out
    assert (place / "results.csv").read_bytes() == table
    assert (place / "trials.jsonl").read_bytes() == record
    assert {path.name for path in (place / "figures").iterdir()} == {
        path.name for path in (FILES / "search" / "figures").iterdir()
    }
    rows = list(csv.DictReader(table.decode().splitlines()))
    data = ["--data", str(made / "shards"), "--split", "validate", "--importance", "0", "--no-baselines"]
    assert evaluate.main([str(place / "best"), *data, "--device", "cpu", "-q"]) == 0
    found = json.loads((place / "best/evaluation/validate/metrics.json").read_text())
    assert found["terms"]["rate"]["mean"] == pytest.approx(float(rows[0]["rate"]), rel=1e-7)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
# ray.data, which ray.train loads, sets options of its own that it calls deprecated.
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_a_search_goes_on_with_the_trial_of_then(made: Path, kept_generators: Callable[[], None]) -> None:
    assert tune.main(search(made, "--trials", "3")) == 0
    kept_generators()
    mine, theirs = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (made / "search" / "trials.jsonl", FILES / "told" / "search.jsonl")
    )
    for rows in (mine, theirs):
        for row in rows:
            for clock in ("time", "seconds"):
                row.pop(clock, None)
    same(mine, theirs, "trials.jsonl", 1e-6)


@pytest.fixture
def kept_generators() -> Callable[[], None]:
    """A function that puts the global generator back: Tune's event loop shuffles what it waits for with it."""
    import random

    before = random.getstate()
    return lambda: random.setstate(before)


def test_an_export_opens_with_the_numbers_of_then(made: Path) -> None:
    numbers_of(made / "export" / "vae", "export")
    assert sample.main([str(made / "export/vae"), "--num-samples", "4", "--out", "a.png", "-q"]) == 0


def test_an_exports_programs_compute_as_then(made: Path) -> None:
    """They need torch alone, and were saved by torch 2.13."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("these programs were saved by torch 2.13")
    folder = made / "export" / "vae"
    labels = torch.tensor([0, 1, 0, 1])
    with np.load(FILES / "told" / "export.npz") as theirs:
        encoder = torch.export.load(folder / "encoder.pt2").module()
        latent = encoder(image=maker.pictures(), label=labels)
        np.testing.assert_allclose(latent.numpy(), theirs["encode"], rtol=1e-4, atol=1e-5)
        again = torch.export.load(folder / "decoder.pt2").module()(latent=latent, label=labels)
        np.testing.assert_allclose(again.numpy(), theirs["reconstruct"], rtol=1e-4, atol=1e-5)


def test_no_file_names_a_machine() -> None:
    for path in sorted(FILES.rglob("*")):
        if path.is_file() and path.suffix in TEXT:
            text = path.read_text()
            assert not [word for word in ("/work", "/root", "/home", "/tmp") if word in text], path
