"""Values against formulas written out here, and against scikit-image where it is the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vaedist.evaluation.metrics.image_quality import (
    NAMES,
    batch_metrics,
    mean_ssim_and_map,
    pair_metrics,
    summary,
    too_small,
)
from vaedist.nets.ssim import ssim
from vaedist.nets.ssim import ssim_map as torch_ssim_map


def pair(channels: int = 1, size: int = 24) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.Generator(np.random.PCG64(5))
    original = generator.integers(0, 256, (channels, size, size), dtype=np.uint8)
    original[:, : size // 3] = 0
    noise = generator.integers(-20, 21, original.shape)
    return original, np.clip(original.astype(int) + noise, 0, 255).astype(np.uint8)


def test_the_published_window_and_the_default_one() -> None:
    x, y = pair()
    a, b = x[0] / 255, y[0] / 255
    found = pair_metrics(x, y)
    assert found.keys() == set(NAMES)
    published = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    mean, full = structural_similarity(a, b, full=True, **published)
    assert found["ssim"] == pytest.approx(mean, abs=1e-12)
    assert found["ssim_foreground"] == pytest.approx(full[x[0] > 0].mean(), abs=1e-12)
    mean, full = structural_similarity(a, b, full=True, data_range=1.0)
    assert found["ssim_default"] == pytest.approx(mean, abs=1e-12)
    assert found["ssim_default_foreground"] == pytest.approx(full[x[0] > 0].mean(), abs=1e-12)
    assert found["psnr"] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0), abs=1e-12)
    assert found["mse"] == pytest.approx(((a - b) ** 2).mean(), abs=1e-15)
    assert found["mae"] == pytest.approx(np.abs(a - b).mean(), abs=1e-15)


def test_the_data_range_is_a_constant() -> None:
    """A dark pair, whose own range is a twentieth: by its own range its SSIM would be lower."""
    x, y = (image // 20 for image in pair())
    own = structural_similarity(x[0] / 255, y[0] / 255, data_range=(x.max() - x.min()) / 255)
    assert pair_metrics(x, y)["ssim_default"] > own + 0.02


def test_color_is_the_mean_over_channels_and_foreground_is_any_channel() -> None:
    x, y = pair(channels=3)
    x[:, :12] = 0
    x[1, 4:12] = 9  # foreground in one channel alone
    found = pair_metrics(x, y)
    single = [pair_metrics(x[c : c + 1], y[c : c + 1])["ssim"] for c in range(3)]
    assert found["ssim"] == pytest.approx(np.mean(single), abs=1e-12)
    assert found["ssim_foreground"] == pytest.approx(mean_ssim_and_map(x, y)[1][:, 4:].mean(), abs=0.05)
    foreground = (x > 0).any(0)
    assert found["ssim_foreground"] == pytest.approx(
        mean_ssim_and_map(x, y)[1][:, foreground].mean(), abs=1e-12
    )


@pytest.mark.parametrize("gaussian", [True, False])
def test_the_training_loss_means_the_same_ssim(gaussian: bool) -> None:
    x, y = pair(channels=3)
    a, b = (torch.from_numpy(image / 255.0)[None] for image in (x, y))
    window = "gaussian" if gaussian else "uniform"
    assert np.allclose(
        torch_ssim_map(a, b, window)[0].numpy(), mean_ssim_and_map(x, y, gaussian=gaussian)[1], atol=1e-10
    )
    name = "ssim" if gaussian else "ssim_default"
    assert float(ssim(a, b, window)) == pytest.approx(pair_metrics(x, y)[name], abs=1e-10)


@pytest.mark.parametrize(("size", "channels"), [(6, 1), (10, 3), (24, 3), (161, 1), (170, 3)])
def test_a_batch_has_the_numbers_of_its_pairs(size: int, channels: int) -> None:
    """scikit-image is the reference: for a noisy pair, equal images, no foreground, and a wide picture."""
    x, y = pair(channels, size)
    pairs = [(x, y), (y, x), (x, x), (np.zeros_like(x), y), (x[:, ::-1].copy(), np.full_like(x, 255))]
    pairs = [tuple(np.concatenate([image, image[..., :3]], axis=2) for image in two) for two in pairs]
    found = batch_metrics(*(torch.from_numpy(np.stack(side)) for side in zip(*pairs, strict=True)))
    assert len(found) == len(pairs)
    for row, (original, other) in zip(found, pairs, strict=True):
        assert row == pytest.approx(pair_metrics(original, other), abs=1e-11, nan_ok=True)
    assert found[2]["mse"] == 0 and math.isnan(found[2]["psnr"])


def test_what_is_not_defined_is_nan() -> None:
    x, _ = pair()
    same = pair_metrics(x, x)
    assert same["ssim"] == same["ssim_foreground"] == 1
    assert same["mse"] == same["mae"] == 0
    assert math.isnan(same["psnr"])  # infinite: it would make every mean infinite
    black = pair_metrics(np.zeros_like(x), x)
    assert math.isnan(black["ssim_foreground"])
    assert math.isfinite(black["ssim"])


@pytest.mark.parametrize(
    ("size", "missing"),
    [
        (161, set()),
        (11, {"ms_ssim"}),
        (10, {"ms_ssim", "ssim", "ssim_foreground"}),
        (6, {"ms_ssim", "ssim", "ssim_foreground", "ssim_default", "ssim_default_foreground"}),
    ],
)
def test_images_smaller_than_the_window(size: int, missing: set[str]) -> None:
    x, y = pair(size=size)
    assert {name for name, value in pair_metrics(x, y).items() if math.isnan(value)} == missing
    assert too_small(size, 200).keys() == missing
    assert all(f"{name} is not defined, because " in why for name, why in too_small(size, 200).items())


def test_summary_states_how_many_images_have_a_value() -> None:
    found = summary([1.0, math.nan, 4.0, math.inf])
    assert found == {"mean": 2.5, "std": 1.5, "count": 2}
    assert summary([math.nan]) == {"mean": None, "std": None, "count": 0}


def test_summary_does_not_depend_on_the_order() -> None:
    values = np.random.Generator(np.random.PCG64(1)).lognormal(0, 9, 1000).tolist()
    assert summary(values) == summary(values[::-1]) == summary(sorted(values))
