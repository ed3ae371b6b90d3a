"""What validation leaves behind: numbered pictures, the projector's files, rows per latent unit, a table, norms."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ranks import run_ranks
from tests.run_commands import curve, small_job
from tests.training.test_equality import furthest
from vaedist.config.job import Job
from vaedist.config.settings import parse
from vaedist.core.errors import UserError
from vaedist.core.imaging import GRAY, RED, framed
from vaedist.data.format.index import Index
from vaedist.data.loading.inputs import EvaluationInputs
from vaedist.data.loading.stream import EvaluationStream, EvaluationStreamConfig
from vaedist.distributed.process_group import Group
from vaedist.evaluation.metrics.features import WEIGHTS
from vaedist.models.contract import build
from vaedist.runs.fit_options import FitOptions
from vaedist.runs.metrics_csv import MetricsCsv
from vaedist.runs.open_run import open_run
from vaedist.runs.resolved_job import resolved
from vaedist.training.loop import fit
from vaedist.training.validation import EMBEDDED, validate

QUIET = FitOptions(quiet=True)


def a_job(data: Path, **train: Any) -> Job:
    """Constant rate: a run of 8 steps begins like one of 16."""
    settings = {"steps": 16, "validate_every": 4, "save_every": 4, "optim": {"main": {}}, "precision": "fp64"}
    return small_job(data, **settings | train)


@pytest.fixture(scope="module")
def run(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched") / "run"
    fit(a_job(phantom), folder, options=QUIET)
    return folder


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path))


def test_a_numbered_picture_per_validation(run: Path, phantom: Path) -> None:
    names = sorted(path.name for path in (run / "figures").glob("validation-*"))
    assert names == [f"validation-{step:09d}.png" for step in (4, 8, 12, 16)]
    sheet = pixels(run / "figures" / names[-1])
    side, pad = 16 + 2, 2  # 16x16 images, a frame of 1
    assert sheet.shape == (4 * (side + pad) + pad, 8 * (side + pad) + pad, 3)
    tiles = [
        [
            sheet[pad + row * (side + pad) :, pad + column * (side + pad) :][:side, :side]
            for column in range(8)
        ]
        for row in range(4)
    ]
    assert all((tile[0] == RED).all() and (tile[:, -1] == RED).all() for tile in tiles[0]), "originals"
    assert all((tile[0] == GRAY).all() for row in tiles[1:] for tile in row)
    stream = EvaluationStream(Index.open(phantom), "validate", EvaluationStreamConfig(batch_size=1))
    shown = {batch["sample"][0]: batch["image"][0, 0] for batch in stream}
    wanted = np.linspace(0, 31, 8).round().astype(int)
    for sample, tile in zip(wanted, tiles[0], strict=True):
        assert (tile[1:-1, 1:-1, 0] == shown[sample].numpy()).all(), "spread evenly over the split"
    one, other = (pixels(run / "figures" / name) for name in names[-2:])
    assert (one[: side + pad] == other[: side + pad]).all() and (one != other).any()


def test_a_denoisers_input_is_shown_too(phantom: Path, tmp_path: Path) -> None:
    content = a_job(phantom, steps=1).model_dump(mode="json")
    content["augment"] = {"gaussian": 0.3, "denoise": True}
    fit(parse(Job, content, "test"), tmp_path / "run", options=QUIET)
    sheet = pixels(tmp_path / "run" / "figures" / "validation-000000001.png")
    assert sheet.shape[0] == 5 * 20 + 2, "originals, inputs, reconstructions, two rows of samples"
    originals, inputs = sheet[3:19, :, 0].astype(float), sheet[23:39, :, 0].astype(float)
    assert 20 < np.abs(originals - inputs).mean() < 100


def test_frames() -> None:
    images = np.full((2, 56, 30), 9, np.uint8)
    red, colour = framed(images), framed(np.full((1, 8, 8, 3), 7, np.uint8), GRAY)
    assert red.shape == (2, 58, 32, 3) and colour.shape == (1, 10, 10, 3)
    assert (red[:, 1:-1, 1:-1] == 9).all() and (red[:, 0] == RED).all() and (red[:, :, 0] == RED).all()
    assert (colour[:, 1:-1, 1:-1] == 7).all() and (colour[:, -1] == GRAY).all()


def test_the_projector_opens_the_last_validation(run: Path, phantom: Path) -> None:
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    board = run / "tensorboard"
    config = text_format.Parse((board / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (embedding,) = config.embeddings
    rows = [line.split("\t") for line in (board / embedding.tensor_path).read_text().splitlines()]
    assert len(rows) == 32 and {len(row) for row in rows} == {4}
    trained = open_run(run)
    stream = EvaluationStream(Index.open(phantom), "validate", EvaluationStreamConfig(batch_size=32))
    (batch,) = list(stream)
    means = trained.model.encode(batch["image"]).mean
    assert np.array(rows, float) == pytest.approx(means.numpy(), rel=1e-4, abs=1e-5), "not of an earlier one"
    header, *lines = (board / embedding.metadata_path).read_text().splitlines()
    assert header == "class\tsample" and len(lines) == 32
    classes = Index.open(phantom).classes
    assert [line.split("\t") for line in lines] == [
        [classes[label], str(sample)] for sample, label in enumerate(batch["label"].tolist())
    ]
    sheet = pixels(board / embedding.sprite.image_path)
    assert list(embedding.sprite.single_image_dim) == [16, 16] and sheet.shape == (6 * 16, 6 * 16)
    assert (sheet[16:32, :16] == batch["image"][6, 0].numpy()).all(), "row by row, six to a row"


def test_the_projector_holds_a_bounded_even_choice_of_small_thumbnails(
    phantom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert EMBEDDED == 512
    monkeypatch.setattr("vaedist.training.validation.EMBEDDED", 5)
    monkeypatch.setattr("vaedist.training.validation.THUMBNAIL", 4)
    job = a_job(phantom)
    index = Index.open(phantom)
    model = build(job.model, index.spec, 0).double()
    stream = EvaluationStream(index, "validate", EvaluationStreamConfig(batch_size=7))
    _, seen = validate(model, EvaluationInputs(stream, job), job, Group(torch.device("cpu")), 0)
    assert seen.latents["sample"].tolist() == [0, 8, 16, 23, 31]
    assert seen.latents["thumbnail"].shape == (5, 1, 4, 4) and seen.latents["mean"].shape == (5, 4)


# The same for every number of processes and attempts ----------------------------------------------------------

FIT = """
import sys
from pathlib import Path
from vaedist.config.job import Job
from vaedist.runs.fit_options import FitOptions
from vaedist.training.loop import fit
fit(Job.model_validate_json(sys.argv[1]), Path(sys.argv[2]), options=FitOptions(quiet=True))
"""


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(run: Path, phantom: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    run_ranks(FIT, 2, a_job(phantom).model_dump_json(), str(two))
    worst, place = furthest(curve(run), curve(two))
    assert worst < 1e-9, place
    for mine, theirs in zip(latents(run), latents(two), strict=True):
        for name in ("kl", "variance"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-9, abs=1e-12)
    for name in ("tensorboard/projector/sprite.png", "tensorboard/projector/metadata.tsv"):
        assert (run / name).read_bytes() == (two / name).read_bytes()
    for path in (run / "figures").glob("validation-*"):
        one, other = (pixels(folder / "figures" / path.name).astype(int) for folder in (run, two))
        assert np.abs(one - other).max() <= 1, "a grey value may round to its neighbour"


def latents(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "latents.jsonl").read_text().splitlines()]


def test_a_resumed_run_leaves_what_an_uninterrupted_one_leaves(
    run: Path, phantom: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "run"
    shutil.copytree(run, cut)
    # As if killed long after the checkpoint of step 8, with all that came later still lying there.
    fit(a_job(phantom, steps=8), tmp_path / "short", options=QUIET)
    shutil.rmtree(cut / "checkpoints")
    shutil.copytree(tmp_path / "short" / "checkpoints", cut / "checkpoints")
    (cut / "figures" / "validation-000000020.png").write_bytes(b"of a future that never was")
    fit(a_job(phantom), cut, options=QUIET)
    assert curve(cut) == curve(run)
    for name in ("latents.jsonl", "tensorboard/projector/tensors.tsv", "tensorboard/projector/sprite.png"):
        assert (cut / name).read_bytes() == (run / name).read_bytes(), name
    figures = {path.name: path.read_bytes() for path in (run / "figures").glob("validation-*")}
    assert {path.name: path.read_bytes() for path in (cut / "figures").glob("validation-*")} == figures
    assert table(cut) == from_rows(cut)


# Table --------------------------------------------------------------------------------------------------------


def table(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def from_rows(run: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = list(dict.fromkeys(["step", "kind", "epoch", "time", *(name for row in rows for name in row)]))
    return [{name: "" if row.get(name) is None else str(row[name]) for name in names} for row in rows]


def test_metrics_csv_holds_the_rows_of_metrics_jsonl(run: Path) -> None:
    found = table(run)
    assert found == from_rows(run) and len(found) == 20
    assert [*found[0]][:4] == ["step", "kind", "epoch", "time"]


def test_a_new_column_and_a_comma(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": 1, "kind": "train", "loss": 0.5}]
    kept = MetricsCsv(tmp_path / "metrics.csv", lambda: rows)
    rows.append({"step": 2, "kind": "train", "loss": None})
    kept.add(rows[-1])
    rows.append({"step": 3, "kind": "train", "loss": 0.25, "a,b": 1.0})
    kept.add(rows[-1])
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        'step,kind,epoch,time,loss,"a,b"',
        "1,train,,,0.5,",
        "2,train,,,,",
        "3,train,,,0.25,1.0",
    ]


# Norms --------------------------------------------------------------------------------------------------------


def test_norms_of_modules_add_up(run: Path, phantom: Path) -> None:
    rows = [row for row in curve(run) if row["kind"] == "train"]
    for row in rows:
        parts = [row["gradient_norm/encoder"], row["gradient_norm/decoder"]]
        assert math.hypot(*parts) == pytest.approx(row["gradient_norm"], rel=1e-9)
    raw = open_run(run / "checkpoints" / "step-000000016", weights="raw").model
    for name in ("encoder", "decoder"):
        held = torch.cat([p.flatten() for p in getattr(raw, name).parameters()])
        assert rows[-1][f"weight_norm/{name}"] == pytest.approx(held.norm().item(), rel=1e-9)


def test_norms_of_modules_are_taken_where_they_are_logged(phantom: Path, tmp_path: Path) -> None:
    fit(a_job(phantom, steps=7, log_every=3, validate_every=7), tmp_path / "run", options=QUIET)
    rows = [row for row in curve(tmp_path / "run") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [3, 6, 7]
    assert all("weight_norm/encoder" in row and "gradient_norm/encoder" in row for row in rows)


# A measure of sample quality as monitor -------------------------------------------------------------------------


def test_a_monitor_that_cannot_be_measured_is_refused_at_the_start(phantom: Path, tmp_path: Path) -> None:
    kid = {"metric": "kid[vd-00000000]", "mode": "min"}
    with pytest.raises(UserError, match=r"train\.monitor\.metric is 'kid.*sample is not defined, because"):
        fit(small_job(phantom, "vqvae", steps=1, monitor=kid), tmp_path / "run", options=QUIET)
    with pytest.raises(UserError, match=r"of recall the maximum is best: set train\.monitor\.mode=max"):
        resolved(a_job(phantom, monitor={"metric": "recall"}))


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the extractor's weights are not here")
@pytest.mark.slow
def test_sample_quality_decides_what_is_best_on_any_number_of_processes(
    phantom: Path, tmp_path: Path
) -> None:
    job = a_job(phantom, steps=8, monitor={"metric": "kid", "images": 20})
    one, two = tmp_path / "one", tmp_path / "two"
    outcome = fit(job, one, options=QUIET)
    run_ranks(FIT, 2, job.model_dump_json(), str(two))
    (name,) = [name for name in outcome.metrics if name.startswith("kid[")]
    best = json.loads((one / "best.json").read_text())
    rows = [row for row in curve(one) if row["kind"] == "validate"]
    assert best["metric"] == name and best["value"] == min(row[name] for row in rows)
    for mine, theirs in zip(rows, [row for row in curve(two) if row["kind"] == "validate"], strict=True):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4)
