"""SSIM against scikit-image, borders included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

from vaedist.core.context import generator
from vaedist.nets.ssim import MS_SSIM_SIDE, Window, border, ms_ssim, ssim, ssim_map

SETTINGS = {
    "gaussian": {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False},
    "uniform": {},
}


def pair(height: int, width: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth picture with a black part, and a noisy copy, both in [0, 1]."""
    rows, columns = torch.meshgrid(
        torch.linspace(0, 7, height, dtype=torch.float64),
        torch.linspace(0, 5, width, dtype=torch.float64),
        indexing="ij",
    )
    x = (torch.sin(rows) * torch.cos(columns)).clamp(0, 1)[None, None]
    disturbance = torch.randn(x.shape, generator=generator("ssim", noise), dtype=torch.float64)
    return x, (x + noise * disturbance).clamp(0, 1)


@pytest.mark.parametrize("window", ["gaussian", "uniform"])
@pytest.mark.parametrize(("height", "width"), [(11, 11), (13, 29), (64, 48)])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.5])
def test_equals_scikit_image(window: Window, height: int, width: int, noise: float) -> None:
    x, y = pair(height, width, noise)
    mean, full = structural_similarity(
        x[0, 0].numpy(), y[0, 0].numpy(), data_range=1.0, full=True, **SETTINGS[window]
    )
    ours = ssim_map(x, y, window)
    np.testing.assert_allclose(ours[0, 0].numpy(), full, atol=1e-10, rtol=0)
    assert float(ssim(x, y, window)) == pytest.approx(mean, abs=1e-10)
    assert ours.shape == x.shape
    inside = full[border(window) : height - border(window), border(window) : width - border(window)]
    assert mean == pytest.approx(inside.mean(), abs=1e-12)


def test_channels_and_images_do_not_mix() -> None:
    pictures = [pair(20, 20, noise) for noise in (0.01, 0.1, 0.2, 0.3)]
    x = torch.cat([p[0] for p in pictures]).view(2, 2, 20, 20)
    y = torch.cat([p[1] for p in pictures]).view(2, 2, 20, 20)
    apart = torch.stack([ssim_map(*p)[0, 0] for p in pictures]).view(2, 2, 20, 20)
    torch.testing.assert_close(ssim_map(x, y), apart, rtol=0, atol=1e-12)


def test_single_precision_is_close_enough_for_a_loss() -> None:
    x, y = pair(64, 64, 0.05)
    assert float(ssim(x.float(), y.float())) == pytest.approx(float(ssim(x, y)), abs=2e-5)
    assert ssim_map(x.bfloat16(), y.bfloat16()).dtype == torch.float32


def test_gradient() -> None:
    x, y = pair(12, 11, 0.1)
    y.requires_grad_()
    assert torch.autograd.gradcheck(lambda image: ssim_map(x, image), (y,), atol=1e-6)


def test_identical_images_score_one_and_pull_nowhere() -> None:
    x, _ = pair(32, 32, 0.1)
    y = x.clone().requires_grad_()
    similarity = ssim(x, y)
    similarity.sum().backward()
    torch.testing.assert_close(similarity, torch.ones_like(similarity))
    assert y.grad is not None and y.grad.abs().max() < 1e-12


def test_a_window_made_in_inference_mode_serves_a_loss_later() -> None:
    x, y = pair(17, 19, 0.1)  # a size no other test has cached
    with torch.inference_mode():
        ssim(x, y)
    y.requires_grad_()
    ssim(x, y).sum().backward()
    assert y.grad is not None and float(y.grad.abs().max()) > 0


def reference_ms_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """The product written out with scipy's filters, scale by scale."""

    def window_mean(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, truncate=3.4)[5:-5, 5:-5]  # 11x11

    factors = []
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        mx, my = window_mean(x), window_mean(y)
        vx, vy, cxy = window_mean(x * x) - mx**2, window_mean(y * y) - my**2, window_mean(x * y) - mx * my
        part = (2 * cxy + 0.0009) / (vx + vy + 0.0009)
        if scale == 4:
            part = part * (2 * mx * my + 0.0001) / (mx**2 + my**2 + 0.0001)
        factors.append(part.mean() ** weight)
        x, y = (np.pad(z, [(0, n % 2) for n in z.shape], mode="edge") for z in (x, y))
        x, y = ((z[::2, ::2] + z[1::2, ::2] + z[::2, 1::2] + z[1::2, 1::2]) / 4 for z in (x, y))
    return float(np.prod(factors))


@pytest.mark.parametrize(("height", "width"), [(161, 161), (176, 203), (256, 256)])
def test_several_scales(height: int, width: int) -> None:
    values = []
    for noise in (0.02, 0.1, 0.3):
        x, y = pair(height, width, noise)
        values.append(float(ms_ssim(x, y)))
        assert values[-1] == pytest.approx(reference_ms_ssim(x[0, 0].numpy(), y[0, 0].numpy()), abs=1e-9)
        assert float(ms_ssim(x, x)) == pytest.approx(1, abs=1e-12)
    assert values == sorted(values, reverse=True)


def test_several_scales_of_several_images() -> None:
    pictures = [pair(170, 170, noise) for noise in (0.01, 0.1, 0.2, 0.3)]
    x = torch.cat([p[0] for p in pictures]).view(2, 2, 170, 170)
    y = torch.cat([p[1] for p in pictures]).view(2, 2, 170, 170)
    apart = torch.stack([ms_ssim(*p)[0] for p in pictures]).view(2, 2).mean(1)
    torch.testing.assert_close(ms_ssim(x, y), apart, rtol=0, atol=1e-12)


def test_opposite_pictures_have_no_multi_scale_similarity() -> None:
    """A negative mean to a broken power would be no number."""
    x, _ = pair(MS_SSIM_SIDE, MS_SSIM_SIDE, 0.0)
    assert float(ms_ssim(x, 1 - x)) == 0


def test_too_few_pixels_for_the_last_scale() -> None:
    x, y = pair(MS_SSIM_SIDE - 1, MS_SSIM_SIDE, 0.1)
    with pytest.raises(AssertionError, match="161x161"):
        ms_ssim(x, y)
