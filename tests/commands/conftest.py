"""A small packed phantom and two runs trained on it for a few steps, by the code that users run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vaedist.config.job import Job
from vaedist.data.packing.pack import PackingConfig, pack
from vaedist.data.sources import SourceSettings
from vaedist.runs.fit_options import FitOptions
from vaedist.training.loop import fit

SIZE = 16
COUNT = {"train": 48, "validate": 8, "test": 21}


def pack_phantom(folder: Path, seed: int = 0, size: int = SIZE) -> Path:
    settings = SourceSettings(seed=seed, size=size, count=COUNT)
    pack(PackingConfig(input="phantom", out=folder, seed=seed, size=size, settings=settings))
    return folder


def trained(folder: Path, data: Path, model: dict[str, Any], **more: Any) -> Path:
    train = {
        "steps": 4,
        "batch_size": 8,
        "validate_every": 2,
        "save_every": 2,
        "ema_half_life": 50,
        "threads": 1,
        **more,
    }
    job = Job(name=folder.name, data={"path": str(data)}, model=model, train=train)
    fit(job, folder, options=FitOptions(quiet=True))
    return folder


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default output paths are relative."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def packed() -> Callable[..., Path]:
    """`packed(folder, seed=, size=)`: a packed phantom."""
    return pack_phantom


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_phantom(tmp_path_factory.mktemp("phantom") / "packed")


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    model = {"kind": "vae", "encoder": {"kind": "mlp", "width": 16, "depth": 1}, "latent": 3}
    return trained(tmp_path_factory.mktemp("runs") / "vae", data, model)


@pytest.fixture(scope="session")
def vqvae(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    encoder = {"kind": "conv", "width": 16, "depth": 0, "downsample": 4}
    model = {"kind": "vqvae", "encoder": encoder, "codebook": {"kind": "ema", "codes": 8, "dim": 4}}
    return trained(tmp_path_factory.mktemp("runs") / "vqvae", data, model)


MLP = {"kind": "mlp", "width": 16, "depth": 1}


@pytest.fixture(scope="session")
def cvae(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Two latent numbers, conditional, of which a fifth was hidden in training."""
    model = {"kind": "vae", "encoder": MLP, "latent": 2, "condition": {"dropout": 0.2, "how": "concat"}}
    return trained(tmp_path_factory.mktemp("runs") / "cvae", data, model)


@pytest.fixture(scope="session")
def prior(tmp_path_factory: pytest.TempPathFactory, data: Path, vqvae: Path) -> Path:
    """Over the codes of `vqvae`, conditional."""
    net = {"width": 8, "layers": 2, "hidden": 8}
    model = {"kind": "pixelcnn", "tokenizer": str(vqvae), "net": net, "conditional": True}
    return trained(tmp_path_factory.mktemp("runs") / "prior", data, model)
