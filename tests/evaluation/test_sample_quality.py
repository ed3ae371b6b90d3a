"""The KID of the committed extractor against damage whose order is known: blur, noise, dropped modes.

Rising by chance would not do: each step must be larger than the two standard errors together.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from vaedist.data.format.image_files import Limits
from vaedist.data.sources import Item
from vaedist.data.sources.mnist import read_idx
from vaedist.data.sources.phantom import SLICES, PhantomSource
from vaedist.evaluation.metrics.features import Extractor, default_extractor
from vaedist.evaluation.metrics.sample_metrics import Reference, monitored_value, sample_metrics


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return default_extractor()


def phantom(size: int, count: int, split: str, kept: int = SLICES) -> np.ndarray:
    """Every image another subject's, so that they are independent; slice numbers in turn, `kept` of the 16 lowest."""
    source = PhantomSource(0, size, {split: (count + 1) * SLICES})
    items = [item for item in source.items() if isinstance(item, Item)]
    return np.stack([source.load(items[i * SLICES + i % kept]) for i in range(count)])[:, None]


def blurred(images: np.ndarray, sigma: float) -> np.ndarray:
    if sigma == 0:
        return images
    reach = torch.arange(-12, 13, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (reach / sigma) ** 2)
    kernel /= kernel.sum()
    x = functional.pad(torch.from_numpy(images.astype(np.float32)), (12, 12, 12, 12), mode="reflect")
    x = functional.conv2d(functional.conv2d(x, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return x.round().clamp(0, 255).byte().numpy()


def noisy(images: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.Generator(np.random.PCG64(2)).normal(0, 255 * sigma, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def assert_rising(reference: Reference, sets: list[np.ndarray]) -> list[float]:
    """KID of each set, the first of which is as good as real."""
    found = [sample_metrics(reference, one, reference.extractor, seed=0, only=["kid"]) for one in sets]
    values = [monitored_value(one, "kid") for one in found]
    errors = [next(value for name, value in one.items() if name.startswith("kid_error[")) for one in found]
    print([f"{value:.4f} ±{error:.4f}" for value, error in zip(values, errors, strict=True)])
    assert abs(values[0]) < 4 * errors[0]
    for i in range(1, len(values)):
        assert values[i] - values[i - 1] > errors[i] + errors[i - 1], f"step {i}: {values}"
    return values


def test_kid_rises_with_blur_and_with_noise(extractor: Extractor) -> None:
    reference = Reference(phantom(32, 256, "train"), extractor)
    other = phantom(32, 256, "test")
    assert_rising(reference, [blurred(other, sigma) for sigma in (0, 0.5, 1.0, 2.0)])
    assert_rising(reference, [noisy(other, sigma) for sigma in (0, 0.05, 0.1, 0.2)])


def test_kid_rises_with_a_blur_that_only_full_resolution_shows(extractor: Extractor) -> None:
    """At 256x256 one pixel of blur is a quarter pixel of the whole view."""
    reference = Reference(phantom(256, 64, "train"), extractor)
    other = phantom(256, 64, "test")
    assert_rising(reference, [blurred(other, sigma) for sigma in (0, 1.0, 2.0)])


def test_kid_rises_as_slices_are_dropped(extractor: Extractor) -> None:
    """16, 12, 8 and 4 kinds of slice, from the lowest up; as many images, of as many subjects, as before."""
    reference = Reference(phantom(32, 512, "train"), extractor)
    assert_rising(reference, [phantom(32, 512, "test", kept) for kept in (16, 12, 8, 4)])


@pytest.mark.shared
def test_kid_rises_as_digits_are_dropped_blurred_and_made_noisy(
    extractor: Extractor, shared_data: Path
) -> None:
    folder = shared_data / "mnist"
    images = read_idx(folder / "t10k-images-idx3-ubyte.gz", 3, Limits())[:, None]
    labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz", 1, Limits())
    reference = Reference(images[:600], extractor)
    later, classes = images[600:], labels[600:]
    assert_rising(reference, [later[classes < kept][:600] for kept in (10, 7, 4, 1)])
    assert_rising(reference, [blurred(later[:600], sigma) for sigma in (0, 0.5, 1.0, 2.0)])
    assert_rising(reference, [noisy(later[:600], sigma) for sigma in (0, 0.05, 0.1, 0.2)])


def test_every_metric_separates_equal_laws_from_a_worse_one(extractor: Extractor) -> None:
    reference = Reference(phantom(32, 600, "train"), extractor)
    other = phantom(32, 600, "test")
    good = sample_metrics(reference, other, extractor, seed=0)
    bad = sample_metrics(reference, noisy(blurred(other[:300].repeat(2, 0), 1.0), 0.05), extractor, seed=0)
    for name in (
        "kid",
        "frechet",
        "frechet_extrapolated",
        "sliced_wasserstein",
        "sliced_wasserstein[pixels]",
    ):
        assert monitored_value(good, name) < monitored_value(bad, name), name
    for name in ("precision", "recall", "density", "coverage"):
        assert monitored_value(good, name) > monitored_value(bad, name), name
    assert abs(monitored_value(good, "frechet_extrapolated")) < 0.5 * monitored_value(good, "frechet")
    assert monitored_value(good, "coverage") > 0.8 and monitored_value(good, "density") == pytest.approx(
        1, abs=0.25
    )
    assert math.isfinite(monitored_value(good, "inception_score"))
