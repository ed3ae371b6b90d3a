"""Further ways to look at a run: classes, codes, densities, the latent space, and samples by the thousand."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.commands.conftest import pixels
from vaedist import evaluate, train
from vaedist.core.imaging import channels_last, code_maps, grid, to_uint8
from vaedist.core.terminal import ProgressBars
from vaedist.data.format.index import Index
from vaedist.data.loading.stream import EvaluationStream, EvaluationStreamConfig
from vaedist.inference import sample_files
from vaedist.inference.export.export_run import export_run
from vaedist.runs.open_run import open_run
from vaedist.sample import main

pytestmark = pytest.mark.usefixtures("elsewhere")


def arrays(path: str = "s.npz") -> dict[str, np.ndarray]:
    with np.load(path) as held:
        return dict(held)


def sampled(run: Path, *options: str) -> dict[str, np.ndarray]:
    assert main([str(run), "--npz", "s.npz", *options]) == 0
    return arrays()


# Classes -----------------------------------------------------------------------------------------------------


def test_a_conditional_models_rows_are_its_classes(cvae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = sampled(cvae, "--grid-size", "5", "--seed", "3")
    run = open_run(cvae)
    labels = np.arange(len(run.classes)).repeat(5)
    assert (found["labels"] == labels).all()
    expected = to_uint8(run.model.sample(len(labels), seed=3, label=torch.from_numpy(labels)))
    assert (found["images"] == expected).all()
    assert (pixels("samples.png") == grid(channels_last(expected), 5)[..., 0]).all()
    assert f"classes, row by row: {', '.join(run.classes)}" in capsys.readouterr().out


def test_a_class_is_named_or_numbered(cvae: Path) -> None:
    name = open_run(cvae).classes[1]
    by_name, by_number = (sampled(cvae, "--num-samples", "3", "--class", one) for one in (name, "1"))
    assert by_name["labels"].tolist() == by_number["labels"].tolist() == [1, 1, 1]
    assert (by_name["images"] == by_number["images"]).all()
    several = sampled(cvae, "--num-samples", "5", "--grid-size", "2", "--class", "1", "--class", "none")
    assert several["labels"].tolist() == [1, 1, -1, -1, 1]
    assert len(sampled(cvae, "--class", "0")["images"]) == 64


def test_the_users_files_are_shown_with_and_without_a_class(cvae: Path) -> None:
    Image.new("L", (16, 16), 130).save("a.png")
    image = torch.full((1, 1, 16, 16), 130, dtype=torch.uint8)
    model = open_run(cvae).model
    for options, label in (([], None), (["--class", "1"], torch.tensor([1])), (["--class", "none"], None)):
        found = sampled(cvae, "--reconstruct", "a.png", *options)
        assert (found["reconstructions"] == to_uint8(model.reconstruct(image, label))).all()


# Codes -------------------------------------------------------------------------------------------------------


def test_a_priors_codes_stand_beside_its_images(prior: Path) -> None:
    options = [
        "--num-samples",
        "6",
        "--grid-size",
        "3",
        "--top-k",
        "4",
        "--top-p",
        "0.9",
        "--guidance",
        "1.5",
    ]
    found = sampled(prior, "--codes", *options)
    model = open_run(prior).model
    label = torch.tensor([0, 0, 0, 1, 1, 1])
    sampling: dict[str, Any] = {"label": label, "top_k": 4, "top_p": 0.9, "guidance": 1.5}
    assert (found["codes"] == model.sample_codes(6, **sampling).numpy()).all()
    assert (found["images"] == to_uint8(model.sample(6, **sampling))).all()
    sheet = pixels("samples.png")
    assert sheet.shape == (2 * 18 + 2, 6 * 18 + 2, 3)
    assert (sheet[2:18, 2:18] == found["images"][0, 0][..., None]).all()
    assert (sheet[2:18, 20:36] == code_maps(found["codes"][:1], 16, 16)[0]).all()
    # The same images without their codes.
    assert (sampled(prior, *options)["images"] == found["images"]).all()


def test_a_prior_is_given_away_with_its_tokenizer(prior: Path, vqvae: Path) -> None:
    folder = export_run(prior, "given/prior")
    assert torch.equal(open_run(folder).model.sample(2, seed=4), open_run(prior).model.sample(2, seed=4))
    assert open_run(folder).job.model.tokenizer.run == vqvae.name
    assert str(vqvae.parent).encode() not in (folder / "state.pt").read_bytes()


def test_codes_of_the_users_files(vqvae: Path) -> None:
    Image.new("L", (16, 16), 90).save("a.png")
    found = sampled(vqvae, "--reconstruct", "a.png", "--codes")
    expected = open_run(vqvae).model.codes(torch.full((1, 1, 16, 16), 90, dtype=torch.uint8))
    assert (found["codes"] == expected.numpy()).all()
    sheet = pixels("reconstructions.png")
    assert sheet.shape == (20 + 2, 3 * 20 + 2, 3)
    assert (sheet[3:19, 43:59] == code_maps(found["codes"], 16, 16)[0]).all()


# The latent space --------------------------------------------------------------------------------------------


def test_between_two_samples(vae: Path) -> None:
    found = sampled(vae, "--interpolate", "3", "0", "--frames", "6", "--temperature", "0.5")["images"]
    ends = to_uint8(open_run(vae).model.sample(4, temperature=0.5))
    assert (found[0] == ends[3]).all() and (found[-1] == ends[0]).all()
    assert (pixels("interpolation.png") == grid(channels_last(found), 6)[..., 0]).all()
    with Image.open("interpolation.gif") as picture:
        assert picture.n_frames == 10 and picture.size == (128, 128)


def test_between_two_files(vae: Path) -> None:
    images = torch.stack([torch.full((1, 16, 16), grey, dtype=torch.uint8) for grey in (20, 230)])
    for image, name in zip(images, ("a.png", "b.png"), strict=True):
        Image.fromarray(image[0].numpy()).save(name)
    found = sampled(vae, "--interpolate", "a.png", "b.png", "--output-path", "way.png")["images"]
    expected = to_uint8(open_run(vae).model.reconstruct(images))
    assert (found[0] == expected[0]).all() and (found[-1] == expected[1]).all()
    assert sorted(path.name for path in Path().glob("way.*")) == ["way.gif", "way.png"]


def test_a_row_for_each_dimension(vae: Path) -> None:
    found = sampled(vae, "--traverse", "2", "0", "--frames", "5", "--temperature", "2")["images"]
    z = torch.zeros(2, 3)
    z[0, 2], z[1, 0] = -6.0, 6.0
    expected = to_uint8(open_run(vae).model.decode(z).mean)
    assert (found[[0, 9]] == expected).all()
    assert pixels("traversal.png").shape == (2 * 18 + 2, 5 * 18 + 2)


def test_two_latent_numbers_fill_a_plane(cvae: Path) -> None:
    assert sampled(cvae, "--manifold", "--frames", "4", "--class", "0")["images"].shape == (16, 1, 16, 16)
    assert pixels("manifold.png").shape == (64, 64)


# The density after training ----------------------------------------------------------------------------------


def test_a_mixture_is_fitted_once_and_kept(
    vae: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(vae, tmp_path / "run"))
    first = sampled(run, "--sampler", "gmm", "--num-samples", "9", "--seed", "2")["images"]
    message = capsys.readouterr().out
    assert (
        "latents from a Gaussian mixture of 8 components (full covariances), fitted to 48 training" in message
    )
    [stored] = (run / "density").iterdir()
    stamp = stored.stat().st_mtime_ns
    assert (first != sampled(run, "--num-samples", "9", "--seed", "2")["images"]).any()
    again = sampled(run, "--sampler", "gmm", "--num-samples", "4", "--seed", "2")["images"]
    assert (again == first[:4]).all() and stored.stat().st_mtime_ns == stamp
    # Other weights have other latents.
    sampled(run, "--sampler", "gmm", "--weights", "raw")
    assert len(list((run / "density").iterdir())) == 2
    ends = sampled(run, "--interpolate", "0", "2", "--sampler", "gmm", "--seed", "2")["images"][[0, -1]]
    assert (ends == first[[0, 2]]).all()
    stored.write_bytes(stored.read_bytes()[:-8])
    assert main([str(run), "--sampler", "gmm"]) == 2
    assert f"{stored} is damaged: remove it" in capsys.readouterr().err


def test_a_mixture_for_each_class(cvae: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = sampled(cvae, "--sampler", "gmm", "--num-samples", "3", "--class", "1", "--data", str(data))
    assert found["labels"].tolist() == [1, 1, 1]
    assert "for each of" in capsys.readouterr().out
    assert main([str(cvae), "--sampler", "gmm", "--class", "none"]) == 2
    assert "samples without a class are not defined" in capsys.readouterr().err


def test_a_mixture_needs_the_data_that_the_run_was_trained_from(
    vae: Path, packed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(vae, tmp_path / "run"))
    other = packed(tmp_path / "other", seed=5)
    assert main([str(run), "--sampler", "gmm", "--data", str(other)]) == 2
    assert "does not hold the data that the run was trained from" in capsys.readouterr().err
    assert not (run / "density").exists()


# By the thousand ---------------------------------------------------------------------------------------------


def test_large_runs_are_drawn_in_parts(
    vae: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample_files, "LARGEST_PICTURE", 64)
    asked = []
    draw = sample_files.Sampler.draw

    def noting(self: Any, n: int, *rest: Any) -> Any:
        asked.append(n)
        return draw(self, n, *rest)

    monkeypatch.setattr(sample_files.Sampler, "draw", noting)
    found = sampled(vae, "--num-samples", "150", "--tar", "tars")["images"]
    assert asked == [64, 64, 22]
    assert (found == to_uint8(open_run(vae).model.sample(150))).all()
    assert pixels("samples.png").shape == (8 * 18 + 2, 8 * 18 + 2)
    message = capsys.readouterr().out.splitlines()
    assert message[-4:] == [
        "the picture shows the first 64",
        "wrote samples.png",
        "wrote s.npz",
        "wrote tars",
    ]
    [batch] = EvaluationStream(Index.open("tars"), "train", EvaluationStreamConfig(batch_size=150, workers=0))
    assert (batch["image"].numpy() == found).all()


def test_tars_are_data_for_the_other_commands(
    cvae: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(cvae), "--num-samples", "24", "--tar", "tars"]) == 0
    index, run = Index.open("tars"), open_run(cvae)
    assert index.classes == run.classes and index.source["run"] == run.job.name
    assert [index.split("train").label(i) for i in (0, 7, 8)] == [0, 0, 1]
    options = ["--data", "tars", "--other-data", "--split", "train", "--out", "e", "--importance", "0"]
    assert evaluate.main([str(cvae), *options, "--no-baselines"]) == 0
    assert "24" in capsys.readouterr().out
    settings = ["data.path=tars", "data.validation_split=train", "train.steps=2", "train.epochs=null"]
    job = str(cvae / "job.yaml")
    assert train.main([job, *settings, "--run-dir", "again", "-q"]) == 0
    assert open_run("again").data_identity == index.identity


def test_progress_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for watched in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda watched=watched: watched)
        with ProgressBars() as bars:
            advance = bars.start("drawing", 150)
            advance(64)
            advance(150)
        message = capsys.readouterr().err
        assert ("drawing" in message and "/150" in message) == watched


def test_a_mistake_leaves_nothing_behind(vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text").touch()
    for options in (["--tar", "text"], ["--output-path", "text/s.png", "--tar", "new", "--npz", "s.npz"]):
        assert main([str(vae), *options]) == 2
        assert [path.name for path in Path().iterdir()] == ["text"]
    assert len(capsys.readouterr().err.splitlines()) == 2


# What is not there -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vae", ["--class", "0"], "--class is not defined, because the model was not trained with classes"),
        ("vae", ["--top-k", "3"], "top_k is not defined"),
        ("vae", ["--top-p", "0.5"], "top_p is not defined"),
        ("vae", ["--guidance", "2"], "guidance is not defined"),
        ("vae", ["--codes"], "codes is not defined, because its latent is made of numbers"),
        ("vae", ["--manifold"], "a picture of two latent numbers and this model has 3"),
        ("vae", ["--traverse", "3"], "there is no latent dimension 3: the model has 0 to 2"),
        ("vae", ["--interpolate", "0", "none.png"], "there is no image file 'none.png'"),
        ("vae", ["--frames", "5"], "--frames has no meaning for samples"),
        ("vae", ["--traverse", "0", "--frames", "1"], "--frames is 1; give at least 2"),
        ("vae", ["--traverse", "0", "--tar", "t"], "--tar has no meaning with --traverse"),
        ("vae", ["--manifold", "--sampler", "gmm"], "--sampler has no meaning with --manifold"),
        ("vae", ["--data", "d"], "--data is for --sampler gmm"),
        ("cvae", ["--class", "horse"], "the model knows no class 'horse'"),
        ("cvae", ["--class", "99"], "the model knows no class '99'"),
        ("cvae", ["--class", "0", "--class", "1", "--manifold"], "--class is given 2 times"),
        ("vqvae", ["--traverse", "0"], "--traverse is not defined, because the latent is a map of codes"),
        ("prior", ["--sampler", "gmm"], "--sampler gmm is not defined, because the latent is a map of codes"),
        (
            "prior",
            ["--interpolate", "0", "1"],
            "--interpolate is not defined, because the latent is a map of codes",
        ),
        ("prior", ["--top-k", "0"], "--top-k is 0; give at least 1"),
        ("prior", ["--top-p", "1.5"], "top_p is 1.5"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    name: str,
    arguments: list[str],
    message: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(request.getfixturevalue(name)), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(Path().iterdir())
