"""The map of latents, with UMAP where a person has installed it (`vaedist[umap]`)."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from vaedist.evaluation.html_report.latent_section import FEWEST_FOR_UMAP, _plane


@pytest.mark.parametrize("count", [2, FEWEST_FOR_UMAP - 1])
def test_few_images_are_drawn_along_their_principal_axes(count: int) -> None:
    points, axes = _plane(np.random.default_rng(0).standard_normal((count, 4)))
    assert points.shape == (count, 2) and axes[2] == "principal axes"


def test_umap_keeps_groups_apart_and_says_nothing() -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed")
    flat = np.random.default_rng(0).standard_normal((60, 8))
    flat[:30] += 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        points, axes = _plane(flat)
    assert axes == ("UMAP 1", "UMAP 2", "UMAP")
    ours, others = points[:30].mean(0), points[30:].mean(0)
    spread = max(
        np.linalg.norm(points[:30] - ours, axis=1).max(), np.linalg.norm(points[30:] - others, axis=1).max()
    )
    assert np.linalg.norm(ours - others) > spread
