"""The figure of an evaluation: originals, their reconstructions, and where they differ.

Drawn with matplotlib's Agg canvas and no pyplot: nothing global is touched and no screen is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vaedist.core.imaging import GRAY, Pixels, channels_last, figure, figure_png, framed, grid, png_bytes

TITLES = {"ssim": "SSIM", "ssim_default": "SSIM", "psnr": "PSNR"}


def pair_figure(
    originals: Pixels, others: Pixels, titles: Sequence[str], *, heading: str = "", dots_per_inch: int = 110
) -> bytes:
    """A PNG file: one column per pair, with rows original, reconstruction, absolute difference.

    All difference maps share one colour scale, from 0 to the largest difference shown, so that columns compare.

    Args:
        originals, others: uint8 (n, C, H, W), n >= 1.
        titles: n lines, one over each column.
        heading: A line over the whole figure.
    """
    assert len(originals) == len(others) == len(titles) >= 1
    differences = np.abs(originals.astype(np.float64) - others).mean(axis=1) / 255
    largest = float(differences.max()) or 1 / 255
    rows = (channels_last(originals), channels_last(others), differences)
    count, (height, width) = len(titles), originals.shape[2:]
    side = min(2.6, max(1.5, width / dots_per_inch))
    sheet = figure(
        figsize=(count * side + 0.9, 3 * side * height / width + 0.75),
        dpi=dots_per_inch,
        layout="constrained",
    )
    axes = sheet.subplots(3, count, squeeze=False)
    for i, (title, *pictures) in enumerate(zip(titles, *rows, strict=True)):
        for axis, picture in zip(axes[:2, i], pictures[:2], strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        shown = axes[2, i].imshow(pictures[2], cmap="magma", vmin=0, vmax=largest, interpolation="nearest")
        axes[0, i].set_title(title, fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, name in zip(axes[:, 0], ("original", "reconstruction", "difference"), strict=True):
        axis.set_ylabel(name, fontsize=8)
    bar = sheet.colorbar(shown, ax=list(axes[2]), fraction=0.05, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    if heading:
        sheet.suptitle(heading, fontsize=9)
    return figure_png(sheet)


def framed_sheet(originals: Pixels, *others: Pixels, columns: int = 4, pad: int = 2) -> bytes:
    """A PNG file of originals in red frames, each with what was made of it at its right, `columns` of them per row.

    Args:
        originals: uint8 (n, H, W) or (n, H, W, C), n >= 1, as `channels_last` makes them.
        others: The same of its reconstructions, code maps, ...; gray or in colour.
        columns: Originals per row.
        pad: Between the images.
    """
    framed_others = [framed(images, GRAY) for images in others]
    row = np.stack([framed(originals), *framed_others], axis=1)
    sheet = row.reshape(-1, *row.shape[2:])
    return png_bytes(grid(sheet, row.shape[1] * min(columns, len(originals)), pad))


def pair_title(metrics: dict[str, float]) -> str:
    """`SSIM 0.912`, or the PSNR of images too small for an SSIM."""
    for name, label in TITLES.items():
        value = metrics[name]
        if math.isfinite(value):
            return f"{label} {value:.3f}" if label == "SSIM" else f"{label} {value:.1f} dB"
    return "exact"
