from __future__ import annotations

import json
import math
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaedist.config.job import Job
from vaedist.core.context import SampleContext
from vaedist.core.imaging import to_uint8
from vaedist.data.format.index import Index
from vaedist.data.loading.inputs import whole_split
from vaedist.data.loading.stream import EvaluationStream, EvaluationStreamConfig
from vaedist.evaluate import main
from vaedist.evaluation.metrics.code_priors import TokenBaselines
from vaedist.evaluation.metrics.features import default_extractor
from vaedist.evaluation.metrics.image_quality import pair_metrics
from vaedist.evaluation.metrics.per_image import training_images
from vaedist.evaluation.sample_quality import compare_samples
from vaedist.inference.sampling import Sampler
from vaedist.inference.stored_mixture import load_mixture
from vaedist.runs.fit_options import FitOptions
from vaedist.runs.open_run import open_run
from vaedist.training.loop import fit


def results(run: Path, split: str = "test") -> dict[str, object]:
    return json.loads((run / "evaluation" / split / "metrics.json").read_text())


def test_a_vqvae_is_evaluated_whole(vqvae: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(vqvae)]) == 0
    output = capsys.readouterr().out
    document = results(vqvae)
    assert (document["images"], document["step"], document["weights"]) == (21, 4, "ema")
    assert document["data"]["identity"] == Index.open(data).identity
    assert document["data"]["other_data"] is False
    assert document["codes"]["codes"] == 8
    assert document["codes"]["vectors"] == 21 * 16
    assert 1 <= document["codes"]["perplexity"] <= document["codes"]["used"] <= 8

    # The numbers, once more by hand.
    run = open_run(vqvae)
    (batch,) = EvaluationStream(Index.open(data), "test", EvaluationStreamConfig(batch_size=21))
    shown = to_uint8(run.model.reconstruct(batch["image"]))
    rows = [pair_metrics(a, b) for a, b in zip(batch["image"].numpy(), shown, strict=True)]
    for name in ("ssim", "ssim_foreground", "ssim_default", "psnr", "mse", "mae"):
        values = [row[name] for row in rows]
        assert document["metrics"][name]["mean"] == pytest.approx(np.mean(values), rel=1e-4), name
        assert document["metrics"][name]["std"] == pytest.approx(np.std(values), rel=1e-2), name
    lines = [json.loads(line) for line in (vqvae / "evaluation/test/images.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == batch["key"]

    # What is printed and what is written.
    assert f"{document['metrics']['ssim']['mean']:.4f} ±{document['metrics']['ssim']['std']:.4f}" in output
    assert f"codes used {document['codes']['used']} of 8" in output
    for name in ("metrics.json", "images.jsonl", "pairs.png"):
        assert f"wrote {vqvae / 'evaluation' / 'test' / name}" in output
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
    output = capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "metrics.json").read_text())
    groups = document["groups"]
    assert groups.keys() == {"subject", "class", "ward", "scanner"}
    assert [group["images"] for group in groups["subject"].values()] == [16, 5]
    assert [*groups["ward"].values()] == [*groups["subject"].values()]
    assert groups["scanner"]["one"]["metrics"] == document["metrics"]
    assert sum(group["images"] for group in groups["class"].values()) == 21
    assert "per ward" in output
    assert "codes is not defined, because" in output


def test_baselines_stand_in_the_same_table(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(vae), "--split", "train", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    document = json.loads((tmp_path / "metrics.json").read_text())
    assert document["baselines"]["nearest training image"]["mae"]["mean"] == 0
    assert document["baselines"]["nearest training image"]["psnr"]["count"] == 0
    for name in ("this run", "black", "training mean", "nearest training image", "PCA-3"):
        assert any(line.startswith(f"{name} ") for line in output.splitlines()), name


def test_a_vae_has_a_likelihood_and_latents(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(vae), "--limit", "9", "--no-baselines", "--rounds", "2", "--out", str(tmp_path)]
    assert main([*command, "--importance", "60", "--chunk", "7"]) == 0
    output = capsys.readouterr().out
    document = json.loads((tmp_path / "metrics.json").read_text())
    found = document["likelihood"]
    assert (found["name"], found["images"], found["importance_samples"]) == ("surrogate", 9, 60)
    assert found["bits_per_dim"] is None
    assert "Bernoulli likelihood of grey images" in document["not_defined"]["bits_per_dim"]
    assert -found["nll"]["mean"] > found["elbo"]["mean"]
    assert len(set(found["rounds"]["nll"])) == 2
    assert document["latents"]["units"] == 3
    split = document["latents"]["split"]
    assert split["rate"] == pytest.approx(document["terms"]["rate"]["mean"], rel=0.2)
    assert document["baselines"] == {}
    assert "surrogate " in output
    assert "units active" in output
    assert "mutual information" in output

    assert main([*command, "--importance", "60"]) == 0
    again = json.loads((tmp_path / "metrics.json").read_text())["likelihood"]["nll"]
    assert again == pytest.approx(found["nll"], rel=1e-6)  # the chunk is about memory
    assert main([*command, "--importance", "0"]) == 0
    assert "likelihood" not in json.loads((tmp_path / "metrics.json").read_text())


def test_black_and_white_images_have_bits_per_dim(data: Path, tmp_path: Path) -> None:
    model = {"kind": "vae", "encoder": {"kind": "mlp", "width": 8, "depth": 1}, "latent": 2}
    run = tmp_path / "binary"
    train = {"steps": 2, "batch_size": 8, "threads": 1}
    job = Job(name="binary", data={"path": str(data), "binarise": "static"}, model=model, train=train)
    fit(job, run, options=FitOptions(quiet=True))
    assert main([str(run), "--importance", "20", "--no-baselines"]) == 0
    document = results(run)
    assert document["data"]["binarise"] == "static"
    assert document["likelihood"]["name"] == "binary"
    mean = document["likelihood"]["nll"]["mean"]
    assert document["likelihood"]["bits_per_dim"]["mean"] == pytest.approx(mean / (256 * math.log(2)))


def test_runs_stand_in_one_table(
    vae: Path, vqvae: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = open_run(vae).job
    other = tmp_path / "vae-1"
    fit(saved.model_copy(update={"seed": 1, "name": "vae-1"}), other, options=FitOptions(quiet=True))
    out = tmp_path / "out"
    assert main([str(vae), str(vqvae), str(other), "--importance", "5", "--out", str(out)]) == 0
    output = capsys.readouterr().out
    (table,) = json.loads((out / "comparison.json").read_text())["tables"]
    experiments = {experiment["name"]: experiment for experiment in table["experiments"]}
    assert experiments.keys() == {"vae (2 seeds)", "vqvae"}
    repeated = experiments["vae (2 seeds)"]
    assert repeated["seeds"] == [0, 1]
    values = [
        json.loads((out / name / "metrics.json").read_text())["metrics"]["ssim"]["mean"]
        for name in ("vae", "vae-1")
    ]
    assert repeated["numbers"]["SSIM"]["values"] == values
    assert repeated["numbers"]["SSIM"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert experiments["vqvae"]["numbers"]["SSIM"]["std"] is None
    text = (out / "comparison.txt").read_text()
    assert text in output
    assert "none beats another: that takes 3 seeds of each" in text
    assert "nearest training image" in text


def test_samples_and_the_audit(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(vae), "--importance", "0", "--out", str(tmp_path)]
    assert main([*command, "--samples", "12", "--audit"]) == 0
    output = capsys.readouterr().out
    document = json.loads((tmp_path / "metrics.json").read_text())
    found = document["samples"]
    assert (found["real"], found["generated"]) == (21, 12)
    assert set(found["metrics"]) == {"this run", "training images"}
    label = found["extractor"]["name"]
    assert (
        found["metrics"]["this run"][f"kid[{label}]"] > found["metrics"]["training images"][f"kid[{label}]"]
    )
    assert "frechet_extrapolated" in document["not_defined"]
    assert document["audit"]["counts"]["samples"] == 12
    assert (tmp_path / "memorisation.png").exists()
    assert f"memorisation {document['audit']['verdict']}" in output
    assert f"kid[{label}]" in output


def test_samples_from_the_density_after_training(
    vae: Path,
    cvae: Path,
    vqvae: Path,
    packed: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(vae, tmp_path / "run"))
    command = ["--importance", "0", "--samples", "12", "--out", str(tmp_path / "out")]
    found = {}
    for sampler in ("prior", "gmm"):
        assert main([str(run), *command, "--sampler", sampler]) == 0
        found[sampler] = json.loads((tmp_path / "out/metrics.json").read_text())["samples"]
    assert found["prior"]["latents_from"] == "the prior"
    assert found["gmm"]["latents_from"].startswith("Gaussian mixture of 8 components")
    assert f"12 samples from {found['gmm']['latents_from']}" in capsys.readouterr().out
    # The same images as vaedist-sample draws, so the same numbers.
    opened = open_run(run)
    drawn = Sampler(opened.model, mixture=load_mixture(opened)).draw(12).images
    real = training_images(whole_split(Index.open(opened.data_path), "test", opened.job))
    metrics = compare_samples(real, {"this run": drawn}, default_extractor())["metrics"]["this run"]
    assert found["gmm"]["metrics"]["this run"] == metrics != found["prior"]["metrics"]["this run"]
    # A mixture for each class is asked for classes as the training images have them.
    assert main([str(cvae), *command, "--sampler", "gmm"]) == 0
    assert "for each of" in capsys.readouterr().out
    # What has no latents of numbers says so; what has none stored wants the data that it was trained from.
    assert main([str(vqvae), *command, "--sampler", "gmm"]) == 0
    assert "samples" in capsys.readouterr().out
    shutil.rmtree(run / "density")
    other = packed(tmp_path / "other", seed=5)
    assert main([str(run), *command, "--sampler", "gmm", "--data", str(other), "--other-data"]) == 2
    assert "fit it first, with `vaedist-sample" in capsys.readouterr().err


def test_a_prior_stands_beside_counts(
    vqvae: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On codes of an untrained tokenizer: what is tested is the bookkeeping, number by number."""
    model = {
        "kind": "pixelcnn",
        "tokenizer": str(vqvae),
        "net": {"width": 8, "layers": 2, "first": 3, "hidden": 8},
    }
    run = tmp_path / "prior"
    train = {"steps": 3, "batch_size": 8, "threads": 1}
    job = Job(name="prior", data={"path": str(data)}, model=model, train=train)
    fit(job, run, options=FitOptions(quiet=True))
    assert main([str(run), "--samples", "6"]) == 0
    output = capsys.readouterr().out
    document = results(run)
    found = document["prior"]
    assert (found["tokens"], found["codes"], found["images"]) == (16, 8, 21)
    means = {name: value["mean"] for name, value in found["nats_per_token"].items()}
    assert means["prior"] == pytest.approx(document["terms"]["nats_per_token"]["mean"], rel=1e-5)
    assert means["uniform"] == pytest.approx(math.log(8))
    assert means.keys() == {"prior", "uniform", "unigram", "per-position unigram", "neighbour bigram"}

    # Once more by hand: codes, counts, and the image's bound under the tokenizer's Gaussian.
    opened = open_run(run)
    tokenizer = open_run(vqvae).model
    (batch,) = EvaluationStream(Index.open(data), "test", EvaluationStreamConfig(batch_size=21))
    (training,) = EvaluationStream(Index.open(data), "train", EvaluationStreamConfig(batch_size=48))
    codes = tokenizer.codes(batch["image"])
    counted = TokenBaselines(tokenizer.codes(training["image"]).numpy(), 8).nats(codes.numpy())
    for name, nats in counted.items():
        assert means[name] == pytest.approx(nats.mean() / 16)
    nats = -opened.model.code_log_prob(codes).mean()
    assert means["prior"] == pytest.approx(float(nats) / 16, rel=1e-5)
    assert found["name"] == "dequantised"
    uniform = SampleContext(seed=0, samples=range(21)).uniform("dequantise", batch["image"].shape)
    decoder = -tokenizer.decode_codes(codes).dequantized_log_prob(batch["image"], uniform).mean()
    assert found["nll"]["mean"] == pytest.approx(float(nats + decoder), rel=1e-5)
    assert found["bits_per_dim"]["mean"] == pytest.approx(
        float(nats + decoder) / (256 * math.log(2)), rel=1e-5
    )

    assert document["codes"]["vectors"] == 21 * 16
    assert document["tokenizer"] == opened.job.model.tokenizer.sha256
    assert set(document["samples"]["metrics"]) == {"this run", "per-position draws", "training images"}
    assert "neighbour bigram" in output
    assert "image: codes + decoder" in output
    assert "PCA-16" in output


def test_what_does_not_sample_says_so(
    vqvae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(vqvae), "--samples", "12", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "metrics.json").read_text())
    assert "sample is not defined, because" in document["not_defined"]["samples"]
    assert "encode is not defined, because" in document["not_defined"]["likelihood"]
    output = capsys.readouterr().out
    assert "likelihood, latents: encode is not defined, because" in output


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
    output = capsys.readouterr().err
    assert Index.open(other).identity[:12] in output
    assert Index.open(data).identity[:12] in output
    assert "--other-data" in output
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
    ("arguments", "message"),
    [
        (["--limit", "0"], "--limit is 0"),
        (["--importance", "-1"], "--importance is -1"),
        (["--features", "x.pt"], "--features is for sample metrics: say with --num-samples N"),
        (["--sampler", "gmm"], "--sampler is for sample metrics: say with --num-samples N"),
        (["--audit", "--split", "train"], "choose another --split"),
        (["--features", "nowhere.pt", "--samples", "9"], "cannot read the feature extractor nowhere.pt"),
        (["--split", "tset"], "did you mean 'test'"),
        (["--data", "nowhere"], "nowhere is not a packed folder"),
        (["--groups", "nowhere.txt"], "cannot read the groups file nowhere.txt"),
        (["--out", "/dev/null/x"], "leads through /dev/null, which is a file"),
    ],
)
def test_mistakes_are_one_sentence(
    vae: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(vae), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_groups_file_about_other_images(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "groups.txt").write_text("patient_9 a\n")
    assert main([str(vae), "--groups", str(tmp_path / "groups.txt"), "--out", str(tmp_path / "out")]) == 2
    assert "no image is in any group" in capsys.readouterr().err


def test_data_without_a_test_split_are_measured_on_validate_and_it_is_said(
    vae: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of one's own has no test split unless it was asked for; a chain must not end in an error over it."""
    own = tmp_path / "own"
    shutil.copytree(data, own)
    index = json.loads((own / "index.json").read_text())
    assert "test" in index["splits"]
    del index["splits"]["test"]
    (own / "index.json").chmod(0o644)
    (own / "index.json").write_text(json.dumps(index))
    arguments = [
        str(vae),
        "--data",
        str(own),
        "--other-data",
        "--importance",
        "0",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 0
    error = capsys.readouterr().err
    assert "has no test split" in error and "--test-fraction" in error and "too good" in error
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["data"]["split"] == "validate"
    assert main([*arguments, "--split", "test"]) == 2, "a split that was asked for is not replaced"
    assert "has no split 'test'" in capsys.readouterr().err


def test_classes_of_samples_are_as_often_as_among_the_training_images(
    cvae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn evenly, rare classes would look like a fault of the model beside a set that has few of them."""
    from vaedist.evaluation import sample_quality as quality
    from vaedist.runs.open_run import open_run

    asked: list[int] = []
    draw = quality.draw_samples

    def seen(*arguments: object, labels: list[int], **settings: object) -> object:
        asked.extend(labels)
        return draw(*arguments, labels=labels, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(quality, "draw_samples", seen)
    assert main([str(cvae), "--samples", "24", "--importance", "0", "--out", str(tmp_path)]) == 0
    train = Index.open(open_run(cvae).data_path).split("train")
    there = [train.label(place) for place in range(train.count)]
    assert len(asked) == 24
    for number in set(there):
        assert asked.count(number) / 24 == pytest.approx(there.count(number) / len(there), abs=0.13)
