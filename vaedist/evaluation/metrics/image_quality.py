"""How close reconstructions are to their originals: SSIM, MS-SSIM, PSNR, MSE, MAE of pairs of uint8 images.

All values are computed in float64 on uint8 / 255. `pair_metrics` is the definition, one pair at a time, with
scikit-image where it has an implementation; `batch_metrics` gives the same numbers for a batch, on its device.

| name | what |
|---|---|
| `ssim` | structural similarity, published window: Gaussian, sigma 1.5 (11 x 11), population covariance, data range 1 |
| `ssim_default` | the same with scikit-image's default window (7 x 7 mean, sample covariance), data range 1 |
| `ssim_foreground` | the full SSIM map of `ssim`, averaged where the original is > 0 |
| `ssim_default_foreground` | the same from the map of `ssim_default` |
| `ms_ssim` | five-scale SSIM (`vaedist.nets.ssim.ms_ssim`), of images of at least 161 pixels a side |
| `psnr` | 10 log10(1 / MSE) in dB, data range 1.0; not defined where the two images are equal |
| `mse`, `mae` | mean squared and mean absolute difference per pixel and channel, on the [0, 1] scale |

The data range is a constant, never the range of an image: otherwise a dark image would be judged by another rule
than a bright one. The foreground value stands beside the whole-image value because a black background, which
every model gets right, flatters the latter: an all-black picture of a brain slice scores 0.68.

Colour: SSIM is computed per channel and averaged; a pixel is foreground if any of its channels is > 0.

A value that is not defined (no foreground, equal images, an image smaller than the window) is NaN here and is left
out of means, which state how many images they hold (`summary`).

Wang, Bovik, Sheikh, Simoncelli: Image quality assessment: from error visibility to structural similarity (2004).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaedist.core.imaging import Pixels
from vaedist.nets.ssim import MS_SSIM_SIDE, Window, crop_border, ms_ssim, window_statistics

NAMES = tuple("ssim ssim_foreground ssim_default ssim_default_foreground ms_ssim psnr mse mae".split())
WINDOWS = {"ssim": 11, "ssim_default": 7}
"""SSIM variant to the side of its window in pixels; smaller images have no such value."""


def mean_ssim_and_map(
    original: Pixels, other: Pixels, gaussian: bool = True
) -> tuple[float, NDArray[np.float64]]:
    """SSIM of the whole image and at every pixel, by scikit-image.

    Args:
        original, other: uint8 (C, H, W).
        gaussian: The Gaussian window; else scikit-image's default one.

    Returns:
        The mean, and float64 (C, H, W).
    """
    from skimage.metrics import structural_similarity

    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False} if gaussian else {}
    mean, full = structural_similarity(  # type: ignore[no-untyped-call]
        original / 255.0, other / 255.0, data_range=1.0, channel_axis=0, full=True, **window
    )
    return float(mean), full


def pair_metrics(original: Pixels, other: Pixels) -> dict[str, float]:
    """Every metric of `NAMES` for one pair.

    Args:
        original, other: uint8 (C, H, W).

    Returns:
        Name to value; NaN where a metric is not defined for this pair.
    """
    assert original.dtype == other.dtype == np.uint8 and original.ndim == 3
    assert original.shape == other.shape, f"{original.shape} against {other.shape}"
    values = dict.fromkeys(NAMES, math.nan)
    difference = original / 255.0 - other / 255.0
    values["mse"] = float(np.mean(difference**2))
    values["mae"] = float(np.mean(np.abs(difference)))
    if values["mse"] > 0:
        values["psnr"] = -10 * math.log10(values["mse"])
    foreground = (original > 0).any(axis=0)
    for name, window in WINDOWS.items():
        if min(original.shape[1:]) >= window:
            values[name], full = mean_ssim_and_map(original, other, gaussian=name == "ssim")
            if foreground.any():
                values[f"{name}_foreground"] = float(full[:, foreground].mean())
    if min(original.shape[1:]) >= MS_SSIM_SIDE:
        x, y = (torch.from_numpy(image / 255.0)[None] for image in (original, other))
        values["ms_ssim"] = float(ms_ssim(x, y))
    return values


@torch.no_grad()
def batch_metrics(originals: Tensor, others: Tensor) -> list[dict[str, float]]:
    """`pair_metrics` of each pair of a batch.

    Args:
        originals, others: uint8 (B, C, H, W), on one device.

    Returns:
        Per pair: name to value, NaN where a metric is not defined; equal to scikit-image's up to the order of sums.
    """
    assert originals.dtype == others.dtype == torch.uint8 and originals.shape == others.shape
    x, y = originals.double() / 255, others.double() / 255
    squared = (x - y).square().mean((1, 2, 3))
    undefined = torch.full_like(squared, math.nan)
    found = dict.fromkeys(NAMES, undefined)
    found["mse"], found["mae"] = squared, (x - y).abs().mean((1, 2, 3))
    found["psnr"] = torch.where(squared > 0, -10 * squared.log10(), undefined)
    foreground = (originals > 0).any(1)
    pixels = foreground.sum((1, 2))
    windows: dict[str, Window] = {"ssim": "gaussian", "ssim_default": "uniform"}
    for name, window in windows.items():
        if min(x.shape[2:]) >= WINDOWS[name]:
            statistics = window_statistics(x, y, window)
            full = statistics.ssim
            found[name] = crop_border(full, window).mean((1, 2, 3))
            # Without foreground 0 / 0, which is NaN.
            found[f"{name}_foreground"] = (full.mean(1) * foreground).sum((1, 2)) / pixels
            if window == "gaussian" and min(x.shape[2:]) >= MS_SSIM_SIDE:
                found["ms_ssim"] = ms_ssim(x, y, statistics)
    table = torch.stack([found[name] for name in NAMES], 1).tolist()
    return [dict(zip(NAMES, row, strict=True)) for row in table]


def too_small(height: int, width: int) -> dict[str, str]:
    """Metric to a sentence with the reason, for the metrics that images of this size do not have."""
    found = {
        f"{name}{suffix}": f"{name}{suffix} is not defined, because images of {height}x{width} are smaller than "
        f"the {window}x{window} window"
        for name, window in WINDOWS.items()
        for suffix in ("", "_foreground")
        if min(height, width) < window
    }
    if min(height, width) < MS_SSIM_SIDE:
        found["ms_ssim"] = (
            f"ms_ssim is not defined, because images of {height}x{width} are smaller than "
            f"{MS_SSIM_SIDE}x{MS_SSIM_SIDE}, where the last of its five scales holds one window"
        )
    return found


def summary(values: Iterable[float]) -> dict[str, float | int | None]:
    """Mean and spread over images, of the defined values alone.

    Sums are exact (`math.fsum`), so the result does not depend on the order or batching of the images.

    Returns:
        `mean`, `std` (over images, divided by n) and `count`; mean and std are None where count is 0.
    """
    defined = [value for value in values if math.isfinite(value)]
    if not defined:
        return {"mean": None, "std": None, "count": 0}
    mean = math.fsum(defined) / len(defined)
    variance = math.fsum((value - mean) ** 2 for value in defined) / len(defined)
    return {"mean": mean, "std": math.sqrt(variance), "count": len(defined)}


def summaries(rows: Iterable[Mapping[str, float]]) -> dict[str, dict[str, float | int | None]]:
    """`summary` of each column of rows that share their names."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return {name: summary(column) for name, column in columns.items()}
