"""Sample metrics of a model's draws, and what stands beside them; the metrics themselves: test_distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.evaluation.toys import Linear, batches, linear_images
from vaedist.config.job import Spec
from vaedist.core.context import generator
from vaedist.core.errors import UserError
from vaedist.evaluation.metrics.code_priors import TokenBaselines
from vaedist.evaluation.metrics.features import default_extractor
from vaedist.evaluation.metrics.per_image import training_images
from vaedist.evaluation.sample_quality import compare_samples, draw_per_position, draw_samples
from vaedist.models.contract import Likelihood
from vaedist.nets.likelihoods import Gaussian

SPEC = Spec(1, (16, 16))


class Sampler(Linear):
    """Draws from its prior."""

    samples = True

    def sample(  # type: ignore[no-untyped-def]
        self, n: int, *, seed: int = 0, first: int = 0, label=None, temperature: float = 1.0
    ) -> Tensor:
        noise = [torch.randn(3, generator=generator("sample", seed, i)) for i in range(first, first + n)]
        return self.decode(torch.stack(noise).double()).mean

    def decode_codes(self, codes: Tensor) -> Likelihood:
        level = codes.double().repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None] / 3
        return Gaussian(2 * level - 1, torch.tensor(0.1))


def test_draws_do_not_depend_on_their_parts() -> None:
    model = Sampler(SPEC).requires_grad_(False)
    drawn = draw_samples(model, 70)
    assert (drawn.shape, drawn.dtype) == ((70, 1, 16, 16), np.uint8)
    assert (drawn[64:] == draw_samples(model, 70)[64:]).all()
    assert (drawn[:5] == draw_samples(model, 5)).all()
    assert (drawn[:5] != draw_samples(model, 5, seed=1)).any()


def test_samples_that_are_not_finite_are_an_error() -> None:
    model = Sampler(SPEC).requires_grad_(False)
    model.bias.fill_(math.nan)
    with pytest.raises(UserError, match="images are not finite"):
        draw_samples(model, 2)


def test_each_set_is_measured_against_the_same_images() -> None:
    """The split against itself is as near as can be, and the blank image is far."""
    real = training_images(batches(linear_images(SPEC, 40), 8))
    features = default_extractor()
    found = compare_samples(real, {"this run": np.zeros_like(real), "itself": real}, features, seed=0)
    assert (found["real"], found["generated"]) == (40, 40)
    assert found["extractor"]["sha256"] == features.sha256
    kid = f"kid[{features.label}]"
    assert found["metrics"]["itself"][f"frechet[{features.label}]"] == pytest.approx(0, abs=1e-6)
    assert found["metrics"]["itself"]["sliced_wasserstein[pixels]"] == 0
    assert found["metrics"]["this run"][kid] > found["metrics"]["itself"][kid] + 0.1
    assert "frechet_extrapolated" in found["not_defined"]


def test_per_position_draws_are_decoded() -> None:
    codes = np.array([[[0, 1], [2, 3]]]).repeat(500, 0)
    pictures = draw_per_position(Sampler(SPEC), TokenBaselines(codes, 4), 70)
    assert (pictures.shape, pictures.dtype) == ((70, 1, 16, 16), np.uint8)
    expected = np.kron(np.array([[0, 85], [170, 255]], np.uint8), np.ones((8, 8), np.uint8))
    assert (pictures[:, 0] == expected).all((1, 2)).mean() > 0.95  # but for the smoothing
