"""A run to give away: the same images from a small folder that names no machine; and the one that is shipped."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runs import small_job
from vaedist import sample
from vaedist.config import Job
from vaedist.context import SampleContext
from vaedist.data.index import Index
from vaedist.data.sources import Limits
from vaedist.data.sources.mnist import read_idx
from vaedist.errors import UserError
from vaedist.pictures import to_uint8
from vaedist.settings import parse
from vaedist.training.attempt import FitOptions
from vaedist.training.density import fit_density, stored_density
from vaedist.training.export import export
from vaedist.training.loop import fit
from vaedist.training.run import Run, open_run

SHIPPED = Path(__file__).parents[2] / "jobs" / "pretrained" / "vae_mnist"


@pytest.fixture(scope="module")
def run(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "vae"
    fit(small_job(phantom, steps=4, save_every=2, validate_every=2), folder, options=FitOptions(quiet=True))
    return folder


def names_in(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return "\n".join(path.read_bytes().decode("latin-1") for path in files)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_an_export_is_the_run_without_its_past(run: Path, weights: str, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "new" / "vae", weights=weights)
    was, now = open_run(run, weights=weights), open_run(folder)
    assert (now.step, now.weights, now.data_identity) == (was.step, was.weights, was.data_identity)
    assert (now.spec, now.classes, now.config) == (was.spec, was.classes, was.config)
    assert torch.equal(now.model.sample(3), was.model.sample(3))
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "state.pt"]
    size = sum(4 * tensor.numel() for tensor in was.model.state_dict().values())
    assert (folder / "state.pt").stat().st_size < size + 30_000
    assert str(run.parent) not in names_in(folder) and str(Path(was.data_path).parent) not in names_in(folder)
    other = "raw" if weights == "ema" else "ema"
    with pytest.raises(UserError, match="weights"):
        open_run(folder, weights=other)
    with pytest.raises(UserError, match="there already"):
        export(run, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["vae"]


def test_the_density_travels_along(run: Path, phantom: Path, tmp_path: Path) -> None:
    mixture = fit_density(open_run(run), Index.open(phantom))
    exported = open_run(export(run, tmp_path / "vae"))
    stored = stored_density(exported)
    assert stored is not None
    assert torch.equal(stored.sample(4, seed=1), mixture.sample(4, seed=1))


def test_a_new_run_starts_from_an_export(run: Path, phantom: Path, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "vae")
    job = small_job(
        phantom, steps=1, save_every=1, validate_every=1, optim={"main": {"learning_rate": 1e-12}}
    )
    content = job.model_dump(mode="json") | {"init_from": {"run": str(folder)}}
    fit(parse(Job, content, where="the test's job"), tmp_path / "run", options=FitOptions(quiet=True))
    started, source = open_run(tmp_path / "run", weights="raw"), open_run(folder)
    for name, tensor in source.model.state_dict().items():
        torch.testing.assert_close(started.model.state_dict()[name], tensor, atol=1e-6, rtol=0)


# The one in this repository ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> Run:
    return open_run(SHIPPED)


def test_the_shipped_run_is_small_and_names_no_machine() -> None:
    sizes = [path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(sizes) < 2_000_000
    text = names_in(SHIPPED)
    assert not [word for word in ("/tmp", "/home", "/root", "/work", os.sep + "Users") if word in text]


def test_the_shipped_run_is_opened_and_sampled(
    shipped: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped.job.name == "vae_mnist" and len(shipped.classes) == 10
    for sampler in ("prior", "gmm"):
        assert sample.main([str(SHIPPED), "--sampler", sampler, "--npz", f"{sampler}.npz"]) == 0
    assert "fitted to 54,000 training latents" in capsys.readouterr().out
    ink = {name: np.load(f"{name}.npz")["images"] / 255 for name in ("prior", "gmm")}
    for images in ink.values():
        assert images.shape == (64, 1, 28, 28)
        assert 0.08 < images.mean() < 0.2  # of real digits: 0.13
        assert images.reshape(64, -1).max(1).min() > 0.5  # each shows something, on black
        assert np.abs(images[..., :2, :]).max() < 0.1
        assert images.std(0).max() > 0.3  # and not all the same


@pytest.mark.shared
def test_the_shipped_run_is_as_good_as_told(shipped: Run, shared_data: Path) -> None:
    images = read_idx(shared_data / "mnist" / "t10k-images-idx3-ubyte.gz", 3, Limits())[:200]
    batch = {"image": torch.from_numpy(images[:, None].copy())}
    terms = shipped.model(batch, SampleContext(seed=0, samples=range(200)))  # type: ignore[arg-type]
    assert float(terms["loss"].mean()) < 110  # 105 nats over the whole test split
    made = to_uint8(shipped.model.reconstruct(batch["image"]))[:, 0] / 255
    assert float(np.square(made - images / 255).mean()) < 0.0125
