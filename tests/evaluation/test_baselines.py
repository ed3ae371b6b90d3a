from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaedist.config.job import Spec
from vaedist.config.model_section import model_config
from vaedist.evaluation.metrics import baselines as module
from vaedist.evaluation.metrics.baselines import Baselines, latent_size
from vaedist.evaluation.metrics.image_quality import pair_metrics, summaries
from vaedist.models.contract import build


def random_images(count: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.integers(0, 256, (count, *shape), dtype=np.uint8)


def low_rank(count: int, rank: int, size: int) -> np.ndarray:
    """Images of a smooth random subspace, so that principal components mean something."""
    generator = np.random.Generator(np.random.PCG64(3))
    factors = generator.normal(size=(count, rank)) * np.linspace(3, 0.5, rank)
    pixels = (
        factors @ generator.normal(size=(rank, size * size)) + generator.normal(size=(count, size * size)) / 2
    )
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    return np.rint(pixels * 255).astype(np.uint8).reshape(count, 1, size, size)


def test_each_baseline_is_what_it_says() -> None:
    training, images = random_images(40, (3, 6, 6)), random_images(9, (3, 6, 6), seed=1)
    found = Baselines(training).reconstruct(images)
    assert tuple(found) == ("black", "training mean", "nearest training image", "PCA-32")
    assert all(pictures.shape == images.shape and pictures.dtype == np.uint8 for pictures in found.values())
    assert not found["black"].any()
    assert (found["training mean"] == np.rint(training.mean(0))).all()
    x, t = images.reshape(9, -1).astype(float), training.reshape(40, -1).astype(float)
    nearest = ((x[:, None] - t) ** 2).sum(2).argmin(1)
    assert (found["nearest training image"] == training[nearest]).all()


@pytest.mark.parametrize("way", ["pixels", "images", "iteration"])
@pytest.mark.parametrize("components", [1, 32, 90])
def test_pca_is_the_exact_one(components: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = {"pixels": 200, "images": 120, "iteration": 200}[way]  # of 144 pixels
    if way == "iteration":
        monkeypatch.setattr(module, "_LARGEST_EXACT", 0)
    training, images = low_rank(count, 40, 12), low_rank(230, 40, 12)[200:]
    t, x = training.reshape(count, -1) / 255, images.reshape(30, -1) / 255
    mean = t.mean(0)
    _, _, rows = np.linalg.svd(t - mean, full_matrices=False)
    exact = np.clip((x - mean) @ rows[:components].T @ rows[:components] + mean, 0, 1) * 255
    fitted = Baselines(training, components)
    found = fitted.reconstruct(images)[f"PCA-{components}"].reshape(30, -1)
    assert np.abs(found - exact).max() < 0.5 + 0.05  # rounding to uint8, and nothing else


def test_as_many_components_as_latent_numbers() -> None:
    spec = Spec(1, (16, 16))
    encoder = {"kind": "conv", "width": 8, "depth": 0, "downsample": 4}
    sections: dict[int, dict[str, object]] = {
        5: {"kind": "vae", "encoder": encoder, "latent": 5},
        48: {"kind": "vae", "encoder": encoder, "latent": {"kind": "map", "channels": 3}},
        16: {"kind": "vqvae", "encoder": encoder, "codebook": {"kind": "ema", "codes": 8, "dim": 4}},
    }
    for size, section in sections.items():
        assert latent_size(build(model_config(section), spec, seed=0)) == size


def test_the_iteration_is_not_asked_for_more_than_it_may_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGEST_EXACT", 0)
    monkeypatch.setattr(module, "_MOST_ITERATED", 6)
    assert Baselines(low_rank(60, 20, 8), 40).names[-1] == "PCA-6"


def test_more_components_err_less() -> None:
    images = low_rank(60, 20, 8)
    errors = [
        float(((Baselines(images, k).reconstruct(images)[f"PCA-{k}"] / 255 - images / 255) ** 2).mean())
        for k in (2, 8, 32, 59)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5  # sixty images span 59 dimensions around their mean


@pytest.mark.parametrize("count", [50, 90])  # less and more than the 64 pixels
def test_chunks_change_nothing(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    training, images = low_rank(count, 20, 8), low_rank(count, 20, 8)[:7]
    whole = Baselines(training).reconstruct(images)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 64 * 7)
    parts = Baselines(training).reconstruct(images)
    for name in whole:
        assert np.abs(whole[name].astype(int) - parts[name]).max() <= 1, name


@pytest.mark.parametrize("count", [1, 2, 20])
def test_fewer_training_images_than_components(count: int) -> None:
    training = random_images(count, (1, 5, 5))
    fitted = Baselines(training)
    found = fitted.reconstruct(training)
    assert fitted.names[-1] == f"PCA-{count - 1}"
    assert (found["nearest training image"] == training).all()
    assert np.abs(found[fitted.names[-1]].astype(int) - training).max() <= 1  # they span themselves


PUBLISHED = {
    # default-window SSIM and its foreground value, as the issue states them (there without rounding to uint8)
    "black": (0.677, 0.068),
    "training mean": (0.618, 0.235),
    "nearest training image": (0.730, 0.237),
    "PCA-32": (0.714, 0.316),
}


@pytest.mark.slow
@pytest.mark.shared
def test_the_known_baselines_of_the_real_slices(shared_data: Path) -> None:
    """855 training and 263 test slices of open MS data in the OASIS layout; about half a minute."""
    root = shared_data / "mri_oasis_layout" / "keras_png_slices_data"

    def read(split: str) -> np.ndarray:
        paths = sorted((root / f"keras_png_slices_{split}").glob("*.png"))
        return np.stack([np.asarray(Image.open(path)) for path in paths])[:, None]

    training, images = read("train"), read("test")
    assert (len(training), len(images)) == (855, 263)
    for name, pictures in Baselines(training).reconstruct(images).items():
        found = summaries(map(pair_metrics, images, pictures))
        values = [found[metric]["mean"] for metric in ("ssim_default", "ssim_default_foreground")]
        assert values == pytest.approx(PUBLISHED[name], abs=0.0025), name
