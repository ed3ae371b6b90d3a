from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaedist.data.index import Index
from vaedist.data.stream import EvaluationStream
from vaedist.evaluate import main
from vaedist.metrics.images import pair_metrics
from vaedist.pictures import to_uint8
from vaedist.training.run import open_run


def results(run: Path, split: str = "test") -> dict[str, object]:
    return json.loads((run / "evaluation" / split / "metrics.json").read_text())


def test_a_vqvae_is_evaluated_whole(vqvae: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(vqvae)]) == 0
    told = capsys.readouterr().out
    document = results(vqvae)
    assert (document["images"], document["step"], document["weights"]) == (21, 4, "ema")
    assert document["data"]["identity"] == Index.open(data).identity
    assert document["data"]["other_data"] is False
    assert document["codes"]["codes"] == 8
    assert document["codes"]["vectors"] == 21 * 16
    assert 1 <= document["codes"]["perplexity"] <= document["codes"]["used"] <= 8

    # The numbers, once more by hand.
    run = open_run(vqvae)
    (batch,) = EvaluationStream(Index.open(data), "test", batch_size=21)
    shown = to_uint8(run.model.reconstruct(batch["image"]))
    rows = [pair_metrics(a, b) for a, b in zip(batch["image"].numpy(), shown, strict=True)]
    for name in ("ssim", "ssim_foreground", "ssim_default", "psnr", "mse", "mae"):
        values = [row[name] for row in rows]
        assert document["metrics"][name]["mean"] == pytest.approx(np.mean(values), rel=1e-4), name
        assert document["metrics"][name]["std"] == pytest.approx(np.std(values), rel=1e-2), name
    lines = [json.loads(line) for line in (vqvae / "evaluation/test/images.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == batch["key"]

    # What is printed and what is written.
    assert f"{document['metrics']['ssim']['mean']:.4f} ±{document['metrics']['ssim']['std']:.4f}" in told
    assert f"codes used {document['codes']['used']} of 8" in told
    for name in ("metrics.json", "images.jsonl", "pairs.png"):
        assert f"wrote {vqvae / 'evaluation' / 'test' / name}" in told
    with Image.open(vqvae / "evaluation/test/pairs.png") as picture:
        assert picture.width > picture.height > 300
    assert stat.S_IMODE((vqvae / "evaluation/test").stat().st_mode) == 0o700


def test_groups_by_subject_class_and_file(
    vae: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = Index.open(data).split("test")
    subjects = sorted({split.subject(i) for i in range(split.count)})
    assert len(subjects) == 2  # 21 slices: one whole head, and five slices of another
    table = "# case ward scanner\n" + "".join(f"{s} ward{i} one\n" for i, s in enumerate(subjects))
    (tmp_path / "groups.txt").write_text(table)
    assert main([str(vae), "--groups", str(tmp_path / "groups.txt"), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "metrics.json").read_text())
    groups = document["groups"]
    assert groups.keys() == {"subject", "class", "ward", "scanner"}
    assert [group["images"] for group in groups["subject"].values()] == [16, 5]
    assert [*groups["ward"].values()] == [*groups["subject"].values()]
    assert groups["scanner"]["one"]["metrics"] == document["metrics"]
    assert sum(group["images"] for group in groups["class"].values()) == 21
    assert "per ward" in told
    assert "codes is not defined, because" in told


def test_baselines_stand_in_the_same_table(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(vae), "--split", "train", "--baselines", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    document = json.loads((tmp_path / "metrics.json").read_text())
    assert document["baselines"]["nearest training image"]["mae"]["mean"] == 0
    assert document["baselines"]["nearest training image"]["psnr"]["count"] == 0
    for name in ("this run", "black", "training mean", "nearest training image", "PCA-32"):
        assert any(line.startswith(f"{name} ") for line in told.splitlines()), name


def test_limit_weights_and_a_checkpoint_folder(vae: Path, tmp_path: Path) -> None:
    checkpoint = next(p for p in sorted((vae / "checkpoints").iterdir()) if p.name.startswith("step-"))
    command = [
        str(checkpoint),
        "--limit",
        "5",
        "--weights",
        "raw",
        "--split",
        "validate",
        "--out",
        str(tmp_path),
    ]
    assert main(command) == 0
    document = json.loads((tmp_path / "metrics.json").read_text())
    assert (document["images"], document["data"]["split_images"]) == (5, 8)
    assert (document["weights"], document["checkpoint"]) == ("raw", checkpoint.name)
    assert main([str(vae), "--limit", "5", "--split", "validate", "--out", str(tmp_path / "ema")]) == 0
    other = json.loads((tmp_path / "ema" / "metrics.json").read_text())
    assert other["metrics"]["mse"]["mean"] != document["metrics"]["mse"]["mean"]


def test_other_data_is_refused_unless_allowed(
    vae: Path, data: Path, packed: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = packed(tmp_path / "other", seed=1)
    assert main([str(vae), "--data", str(other), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert Index.open(other).identity[:12] in told
    assert Index.open(data).identity[:12] in told
    assert "--other-data" in told
    assert not (tmp_path / "out").exists()
    assert main([str(vae), "--data", str(other), "--other-data", "--out", str(tmp_path / "out")]) == 0
    assert "not the data that the run was trained from" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/metrics.json").read_text())["data"]["other_data"] is True
    larger = packed(tmp_path / "larger", size=32)
    assert main([str(vae), "--data", str(larger), "--other-data", "--out", str(tmp_path / "out")]) == 2
    assert "(1, 32, 32)" in capsys.readouterr().err


def test_a_copy_of_the_data_is_the_same_data(vae: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "copy")
    assert (
        main([str(vae), "--data", str(tmp_path / "copy"), "--limit", "3", "--out", str(tmp_path / "out")])
        == 0
    )


def test_damaged_data_end_with_exit_code_3(
    vae: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "copy")
    tar = tmp_path / "copy" / "test-000000.tar"
    tar.chmod(0o600)
    content = bytearray(tar.read_bytes())
    offset = int(Index.open(tmp_path / "copy").split("test").columns(0).offset[3])
    content[offset + 40] ^= 1
    tar.write_bytes(content)
    assert main([str(vae), "--data", str(tmp_path / "copy"), "--out", str(tmp_path / "out")]) == 3
    assert "test-000000.tar" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--limit", "0"], "--limit is 0"),
        (["--split", "tset"], "did you mean 'test'"),
        (["--data", "nowhere"], "nowhere is not a packed folder"),
        (["--groups", "nowhere.txt"], "cannot read the groups file nowhere.txt"),
        (["--out", "/dev/null/x"], "cannot make the folder"),
    ],
)
def test_mistakes_are_one_sentence(
    vae: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(vae), *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


def test_a_groups_file_about_other_images(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "groups.txt").write_text("patient_9 a\n")
    assert main([str(vae), "--groups", str(tmp_path / "groups.txt"), "--out", str(tmp_path / "out")]) == 2
    assert "no image is in any group" in capsys.readouterr().err
