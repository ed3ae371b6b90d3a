"""The picture of a memorization audit: how near samples and held-out images lie to training images, and the pairs."""

from __future__ import annotations

import numpy as np

from vaedist.core.imaging import Pixels, channels_last, figure, figure_png
from vaedist.evaluation.memorization import Audit


def memorization_figure(audit: Audit, samples: Pixels, train: Pixels) -> bytes:
    """A PNG: above, both spaces' distances; below, the closest pairs with their differences.

    It shows training images: it is as private as they are.

    Args:
        audit: Of these images.
        samples, train: uint8 (n, C, H, W) and (N, C, H, W).
    """
    pairs = audit.pairs
    sheet = figure(figsize=(1.5 * len(pairs) + 0.8, 7.4), dpi=100, layout="constrained")
    above, below = sheet.subfigures(2, 1, height_ratios=(2.3, 5))
    for axis, space in zip(above.subplots(1, len(audit.spaces)), audit.spaces.values(), strict=True):
        edges = np.linspace(0, max(space.samples.max(), space.held_out.max(), 1e-9), 41)
        for values, label in ((space.held_out, "held out"), (space.samples, "samples")):
            axis.hist(values, edges, weights=np.full(len(values), 1 / len(values)), alpha=0.55, label=label)
        axis.axvline(space.close.level, color="black", lw=1, ls="--", label="1 % of held out")
        state = "FLAGGED" if space.flagged else "not flagged"
        axis.set_title(f"{space.name}: {space.close} below, {state}", fontsize=8)
        axis.set_xlabel("distance to the nearest training image", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    axes = below.subplots(3, len(pairs), squeeze=False)
    for column, pair in zip(axes.T, pairs, strict=True):
        shown, source = samples[pair.sample], train[pair.train]
        gap = np.abs(shown.astype(np.int16) - source).astype(np.uint8)
        for axis, image in zip(column, channels_last(np.stack([shown, source, gap])), strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        column[0].set_title(f"{pair.space}\n{pair.distance:.4f}, ratio {pair.ratio:.2f}", fontsize=7)
        column[1].set_title(pair.key[:20], fontsize=6)
    for axis, name in zip(axes[:, 0], ("sample", "training image", "difference"), strict=True):
        axis.set_ylabel(name, fontsize=8)
    count = audit.counts
    heading = f"{count['samples']} samples, {count['train']} training images, {count['held_out']} held out"
    sheet.suptitle(heading, fontsize=9)
    return figure_png(sheet)
