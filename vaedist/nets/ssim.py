"""Structural similarity, differentiable and equal to scikit-image's.

    SSIM = (2 mx my + C1)(2 cxy + C2) / ((mx^2 + my^2 + C1)(vx + vy + C2)),   C1 = 0.01^2, C2 = 0.03^2

with local means, variances and covariance under a window, for images in [0, 1] (data range 1). Wang et al.,
"Image quality assessment: from error visibility to structural similarity".

| window | same as `skimage.metrics.structural_similarity(..., data_range=1.0, ...)` with |
|---|---|
| `gaussian` | `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`: 11x11 |
| `uniform` | its defaults: 7x7, sample covariance (n / (n - 1)) |

Borders. `ssim_map` has the size of the image; beyond the edge the image is mirrored with its edge pixel
repeated (d c b a | a b c d | d c b a), as scipy's filters do and as `full=True` shows. The mean that scikit-image
returns leaves out `border` = (side - 1) / 2 pixels along each edge, and so does `ssim`.

Scales. `ms_ssim` is the product over five scales s, each half the size of the one before (2 x 2 means; an odd last
row or column is repeated), of the contrast-structure part to the power w_s; the last has the luminance part too:

    MS-SSIM = mean(l_5 cs_5)^w_5 prod_(s < 5) mean(cs_s)^w_s,   cs = (2 cxy + C2) / (vx + vy + C2)

w = 0.0448, 0.2856, 0.3001, 0.2363, 0.1333, Gaussian window, borders left out at every scale, a negative mean counted
as 0. Wang, Simoncelli, Bovik, "Multi-scale structural similarity for image quality assessment" (2003). The last scale
must hold a window, so each side needs at least 161 pixels: with fewer scales the number would mean something else.

The windows are separable, and each direction is one matrix product with a banded (n, n) matrix that holds the
mirrored border: on a CPU this is several times faster than a one-channel convolution.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Window = Literal["gaussian", "uniform"]

WINDOW_SIDE = {"gaussian": 11, "uniform": 7}

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_SIDE = (WINDOW_SIDE["gaussian"] - 1) * 2 ** (len(SCALE_WEIGHTS) - 1) + 1
"""Smallest height and width that have an MS-SSIM: its last scale is one window wide."""

_C1, _C2 = 0.01**2, 0.03**2


def border(window: Window = "gaussian") -> int:
    """Pixels along each edge that a mean over the image leaves out."""
    return (WINDOW_SIDE[window] - 1) // 2


class WindowStatistics(NamedTuple):
    """Statistics of two images in the window around each pixel, (B, C, H, W) each."""

    mean_x: Tensor
    mean_y: Tensor
    variance_x: Tensor
    variance_y: Tensor
    covariance: Tensor

    @property
    def contrast_structure(self) -> Tensor:
        return (2 * self.covariance + _C2) / (self.variance_x + self.variance_y + _C2)

    @property
    def ssim(self) -> Tensor:
        mx, my, vx, vy, cxy = self
        return ((2 * mx * my + _C1) * (2 * cxy + _C2)) / ((mx * mx + my * my + _C1) * (vx + vy + _C2))


def window_statistics(x: Tensor, y: Tensor, window: Window = "gaussian") -> WindowStatistics:
    """Means, variances and covariance of two images (B, C, H, W) in [0, 1], each channel on its own.

    Computed in fp32, or fp64 for fp64 images. H and W are at least the window's side.
    """
    assert x.shape == y.shape and x.dim() == 4
    side = WINDOW_SIDE[window]
    assert min(x.shape[-2:]) >= side, f"images must be at least {side}x{side}"
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.to(dtype), y.to(dtype)
        rows = _filter_matrix(window, x.shape[-2], dtype, x.device)
        columns = _filter_matrix(window, x.shape[-1], dtype, x.device).T

        def mean(image: Tensor) -> Tensor:
            return rows @ image @ columns

        sample_correction = 1.0 if window == "gaussian" else side**2 / (side**2 - 1)
        mx, my = mean(x), mean(y)
        vx = sample_correction * (mean(x * x) - mx * mx)
        vy = sample_correction * (mean(y * y) - my * my)
        return WindowStatistics(mx, my, vx, vy, sample_correction * (mean(x * y) - mx * my))


def ssim_map(x: Tensor, y: Tensor, window: Window = "gaussian") -> Tensor:
    """SSIM at each pixel, (B, C, H, W); as `window_statistics`."""
    return window_statistics(x, y, window).ssim


def crop_border(full: Tensor, window: Window = "gaussian") -> Tensor:
    """A map without its `border`: (..., H, W) to (..., H - side + 1, W - side + 1)."""
    edge = border(window)
    return full[..., edge:-edge, edge:-edge]


def ssim(x: Tensor, y: Tensor, window: Window = "gaussian") -> Tensor:
    """(B,) mean SSIM as scikit-image returns it: borders left out, channels averaged."""
    return crop_border(ssim_map(x, y, window), window).mean((1, 2, 3))


def ms_ssim(x: Tensor, y: Tensor, full_size: WindowStatistics | None = None) -> Tensor:
    """(B,) multi-scale SSIM of images (B, C, H, W) in [0, 1] of at least `MS_SSIM_SIDE` a side, channels averaged.

    `full_size` is `window_statistics(x, y)` where the caller has it.
    """
    assert min(x.shape[-2:]) >= MS_SSIM_SIDE, f"images must be at least {MS_SSIM_SIDE}x{MS_SSIM_SIDE}"
    product = x.new_ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
    for scale, weight in enumerate(SCALE_WEIGHTS, 1):
        statistics = full_size if full_size is not None and scale == 1 else window_statistics(x, y)
        part = statistics.ssim if scale == len(SCALE_WEIGHTS) else statistics.contrast_structure
        product = product * crop_border(part).mean((2, 3)).clamp(min=0) ** weight
        x, y = _halve(x), _halve(y)
    return product.mean(1)


def _halve(image: Tensor) -> Tensor:
    odd = (image.shape[-1] % 2, image.shape[-2] % 2)
    if any(odd):
        image = functional.pad(image, (0, odd[0], 0, odd[1]), mode="replicate")
    return functional.avg_pool2d(image, 2)


@functools.lru_cache(maxsize=32)
def _filter_matrix(window: Window, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n, n): row i holds the window's weights around i, mirrored at the borders."""
    side = WINDOW_SIDE[window]
    with torch.inference_mode(False):  # the cached matrix may be part of a loss later
        offsets = torch.arange(side, dtype=torch.float64) - side // 2
        weights = torch.exp(-0.5 * (offsets / 1.5) ** 2) if window == "gaussian" else torch.ones_like(offsets)
        weights /= weights.sum()
        index = torch.arange(n)[:, None] + offsets.long()[None, :]
        index = torch.where(index < 0, -1 - index, index)
        index = torch.where(index >= n, 2 * n - 1 - index, index)
        matrix = torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, index, weights.expand(n, side))
        return matrix.to(device, dtype)
