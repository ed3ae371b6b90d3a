"""`vaedist.load`: the same numbers as the commands and the model give, for tensors and arrays, and clear refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vaedist
from tests.commands.conftest import MLP, pack_phantom, trained
from vaedist.core.errors import NotDefined, UserError
from vaedist.core.imaging import to_uint8
from vaedist.data.format.index import Index
from vaedist.data.loading.stream import EvaluationStream, EvaluationStreamConfig
from vaedist.inference.trained_model import TrainedModel
from vaedist.sample import main as sample

SMALL: dict[str, dict[str, Any]] = {
    "vae": {"kind": "vae", "encoder": MLP, "latent": 3},
    "cvae": {"kind": "vae", "encoder": MLP, "latent": 2, "condition": {"dropout": 0.2, "how": "concat"}},
    "vqvae": {
        "kind": "vqvae",
        "encoder": {"kind": "conv", "width": 16, "depth": 0, "downsample": 4},
        "codebook": {"kind": "ema", "codes": 8, "dim": 4},
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_phantom(tmp_path_factory.mktemp("trained") / "packed")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, TrainedModel]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: vaedist.load(trained(folder / name, data, model)) for name, model in SMALL.items()}


@pytest.fixture(scope="module")
def images(data: Path) -> torch.Tensor:
    (batch,) = EvaluationStream(Index.open(data), "test", EvaluationStreamConfig(batch_size=21))
    return batch["image"]


def test_samples_are_those_of_the_command(runs: dict[str, TrainedModel], tmp_path: Path) -> None:
    run = runs["vae"]
    made = run.sample(5, seed=3, temperature=0.7)
    assert (made.shape, made.dtype) == ((5, 1, 16, 16), torch.float32)
    assert made.min() >= 0 and made.max() <= 1
    options = ["--num-samples", "5", "--seed", "3", "--temperature", "0.7", "--npz", str(tmp_path / "s.npz")]
    assert sample([str(run.run.folder), *options, "--output-path", str(tmp_path / "s.png")]) == 0
    with np.load(tmp_path / "s.npz") as file:
        assert (to_uint8(made) == file["images"]).all()
    torch.testing.assert_close(
        run.sample(2, seed=3, first=3, temperature=0.7), made[3:]
    )  # sums of other rows
    assert not torch.equal(run.sample(5, seed=3, sampler="gmm"), run.sample(5, seed=3))
    assert (run.kind, run.shape, run.latent_shape) == ("vae", (1, 16, 16), (3,))
    assert repr(run).startswith("<vae of 1x16x16 images, step 4, ema weights, ")


def test_what_is_given_as_an_array_comes_back_as_one(
    runs: dict[str, TrainedModel], images: torch.Tensor
) -> None:
    run = runs["vae"]
    model = run.run.model
    with torch.no_grad():
        expected = model.reconstruct(images)
        means = model.encode(images).mean
    assert torch.equal(run.reconstruct(images), expected)
    assert torch.equal(run.encode(images), means)
    for given in (
        images.numpy(),
        images[:, 0].numpy(),
        (images / 255.0).numpy(),
        (images / 255.0).double().numpy(),
    ):
        made = run.reconstruct(given)
        assert isinstance(made, np.ndarray) and (made == expected.numpy()).all()
    decoded = run.decode(run.encode(images.numpy()))
    assert isinstance(decoded, np.ndarray) and (decoded == expected.numpy()).all()


def test_classes_by_name_and_number(runs: dict[str, TrainedModel], images: torch.Tensor) -> None:
    run = runs["cvae"]
    name = run.classes[1]
    assert torch.equal(run.sample(4, classes=name), run.sample(4, classes=[1, "1", name, 1]))
    assert not torch.equal(run.sample(4, classes=0), run.sample(4, classes=1))
    assert not torch.equal(run.reconstruct(images, classes=0), run.reconstruct(images, classes=1))
    z = run.encode(images, classes=1)
    assert torch.equal(run.decode(z, classes=1), run.reconstruct(images, classes=1))


def test_codes_go_there_and_back(runs: dict[str, TrainedModel], images: torch.Tensor) -> None:
    run = runs["vqvae"]
    codes = run.encode(images)
    assert (codes.shape, codes.dtype) == ((21, 4, 4), torch.int64)
    assert torch.equal(run.decode(codes), run.reconstruct(images))
    with pytest.raises(NotDefined, match="sample is not defined, because"):
        run.sample(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: run.sample(0), "n is 0"),
        (lambda run: run.sample(2, sampler="flow"), "give 'prior' or 'gmm'"),
        (lambda run: run.sample(2, classes=1), "was not trained with classes"),
        (lambda run: run.sample(2, top_k=3), "top_k is not defined"),
        (lambda run: run.encode(torch.zeros(2, 1, 8, 8)), r"shape \(2, 1, 8, 8\) and the model takes \(n, 1, 16, 16\)"),
        (lambda run: run.encode(torch.zeros(0, 1, 16, 16)), "the model takes"),
        (lambda run: run.encode(np.full((2, 16, 16), 255.0)), "from 255 to 255: give them from 0 to 1, or as uint8"),
        (lambda run: run.encode(np.full((2, 16, 16), np.nan)), "values from nan to nan"),
        (lambda run: run.encode(np.zeros((2, 16, 16), int)), "give uint8 from 0 to 255"),
        (lambda run: run.decode(np.zeros((2, 4))), r"shape \(2, 4\) and the model decodes \(n, 3\)"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(runs: dict[str, TrainedModel], call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(runs["vae"])


def test_wrong_classes_are_named(runs: dict[str, TrainedModel]) -> None:
    with pytest.raises(UserError, match="knows no class 'elbow'; it knows "):
        runs["cvae"].sample(2, classes="elbow")
    with pytest.raises(UserError, match="3 classes are given for 2 images"):
        runs["cvae"].sample(2, classes=[0, 1, 0])
    with pytest.raises(UserError, match="nowhere"):
        vaedist.load("nowhere")


def test_a_name_that_is_a_number_is_the_name(runs: dict[str, TrainedModel]) -> None:
    """Folders may be called 1 and 0: text is a name first, a number is the place."""
    run = runs["cvae"]
    other = TrainedModel(run.run._replace(classes=("1", "0")))
    assert torch.equal(other.sample(3, classes="1"), run.sample(3, classes=0))
    assert torch.equal(other.sample(3, classes=1), run.sample(3, classes=1))


def test_a_mixture_is_fitted_to_the_data_of_the_run_alone(tmp_path: Path, data: Path) -> None:
    run = trained(tmp_path / "run", data, SMALL["vae"])
    other = pack_phantom(tmp_path / "other", seed=5)
    moved = vaedist.load(run)
    moved = TrainedModel(moved.run._replace(data_path=str(other)))
    with pytest.raises(UserError, match="holds others"):
        moved.sample(2, sampler="gmm")
    assert not (run / "density").exists()


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, vaedist; print(sorted({'torch', 'numpy', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
