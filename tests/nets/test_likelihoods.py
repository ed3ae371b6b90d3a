"""Likelihoods against torch.distributions, their sums, scales, precision and samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions

from vaedist.config import Spec
from vaedist.context import LaneContext, generator
from vaedist.errors import UserError
from vaedist.nets.likelihoods import (
    Bernoulli,
    BernoulliLikelihood,
    Gaussian,
    GaussianLikelihood,
    Laplace,
    LaplaceLikelihood,
    Observation,
    check_dssim,
)
from vaedist.nets.ssim import ssim

SHAPE = (3, 2, 5, 4)


def images(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=generator("image", seed), dtype=torch.uint8)


def outputs(shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=generator("output"), dtype=torch.float64)


def uniform(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, generator=generator("uniform"), dtype=torch.float64)


def test_bernoulli_log_prob() -> None:
    a, image = outputs(), images()
    x = image.double() / 255
    expected = x * torch.sigmoid(a).log() + (1 - x) * torch.sigmoid(-a).log()
    got = Bernoulli(a).log_prob(image)
    torch.testing.assert_close(got, expected.sum((1, 2, 3)), rtol=1e-12, atol=0)
    black_and_white = (image > 127).to(torch.uint8) * 255
    true = distributions.Bernoulli(logits=a).log_prob(black_and_white.double() / 255).sum((1, 2, 3))
    torch.testing.assert_close(Bernoulli(a).log_prob(black_and_white), true, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [0.03, 1.0])
def test_gaussian_and_laplace_log_prob(scale: float) -> None:
    a, image = outputs(), images()
    x, b = image.double() / 255, torch.tensor(scale)
    for ours, theirs in [(Gaussian, distributions.Normal), (Laplace, distributions.Laplace)]:
        expected = theirs((a + 1) / 2, b.double()).log_prob(x).sum((1, 2, 3))
        torch.testing.assert_close(ours(a, b).log_prob(image), expected, rtol=1e-12, atol=1e-9)


def test_the_network_scale_runs_from_black_to_white() -> None:
    white, black = (
        torch.full((1, 1, 2, 2), 255, dtype=torch.uint8),
        torch.zeros(1, 1, 2, 2, dtype=torch.uint8),
    )
    for ours in (Gaussian, Laplace):
        up, down = (
            ours(torch.ones(1, 1, 2, 2), torch.tensor(0.1)),
            ours(-torch.ones(1, 1, 2, 2), torch.tensor(0.1)),
        )
        assert up.mse(white).item() == 0 and down.mse(black).item() == 0
        assert up.log_prob(white) > up.log_prob(black)
        beyond = ours(torch.full((1, 1, 2, 2), 3.0), torch.tensor(0.1))
        assert float(beyond.mean.max()) == 1 and float(beyond.location.max()) == 2


def test_log_prob_leaves_autocast_and_half_precision() -> None:
    a, image = outputs((2, 1, 64, 64)).float(), images((2, 1, 64, 64))
    exact = Gaussian(a, torch.tensor(0.1)).log_prob(image)
    with torch.autocast("cpu", torch.bfloat16):
        inside = Gaussian(a, torch.tensor(0.1)).log_prob(image)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, exact, rtol=0, atol=0)
    assert Bernoulli(a.bfloat16()).log_prob(image).dtype == torch.float32
    assert Bernoulli(a.double()).log_prob(image).dtype == torch.float64


@pytest.mark.parametrize("kind", [Bernoulli, Gaussian, Laplace])
def test_samples_follow_the_distribution(kind: type) -> None:
    a = torch.tensor([-0.6, 0.0, 0.4], dtype=torch.float64).view(1, 3, 1, 1)
    scale = [] if kind is Bernoulli else [torch.tensor(0.01)]
    n = 40_000
    decoded = kind(a.expand(n, -1, -1, -1), *scale)
    draws = decoded.sample(uniform((n, 3, 1, 1)))
    assert float(draws.min()) >= 0 and float(draws.max()) <= 1
    torch.testing.assert_close(draws.mean(0), kind(a, *scale).mean[0], rtol=0, atol=0.01)
    spread = {Bernoulli: None, Gaussian: 0.01, Laplace: 0.01 * math.sqrt(2)}[kind]
    if spread is not None:
        torch.testing.assert_close(draws.std(0), torch.full_like(draws[0], spread), rtol=0.03, atol=0)
    else:
        assert set(draws.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("kind", [Gaussian, Laplace])
@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_samples_from_the_ends_of_uniform_noise_are_finite(kind: type, edge: float) -> None:
    decoded = kind(torch.zeros(1, 1, 1, 1), torch.tensor(0.1))
    assert decoded.sample(torch.full((1, 1, 1, 1), edge)).isfinite().all()


@pytest.mark.parametrize("kind", [Bernoulli, Gaussian, Laplace])
def test_gradients(kind: type) -> None:
    a, image = outputs((2, 1, 12, 12)).requires_grad_(), images((2, 1, 12, 12))
    scale = [] if kind is Bernoulli else [torch.tensor(0.2)]
    assert torch.autograd.gradcheck(lambda x: kind(x, *scale).log_prob(image), (a,))
    inside = a.detach().clamp(-0.99, 0.99).requires_grad_()  # away from the cut
    assert torch.autograd.gradcheck(lambda x: kind(x, *scale).dssim(image), (inside,), atol=1e-6)


def test_mse_and_dssim_of_one_image() -> None:
    a, image = outputs((2, 1, 16, 16)).clamp(-1, 1), images((2, 1, 16, 16))
    decoded = Gaussian(a, torch.tensor(0.1))
    x = image.double() / 255
    torch.testing.assert_close(decoded.mse(image), ((a + 1) / 2 - x).square().mean((1, 2, 3)))
    torch.testing.assert_close(decoded.dssim(image), 256 * (1 - ssim((a + 1) / 2, x)) / 2)


def test_sigma_from_data_is_the_standard_deviation_of_all_values() -> None:
    observation = Observation(GaussianLikelihood(sigma="data"))
    batches = [{"image": images((4, 1, 8, 8), seed)} for seed in range(3)]
    observation.prepare(batches, LaneContext(seed=0, step=0, batch_size=4, lanes=2))
    values = torch.cat([b["image"] for b in batches]).double() / 255
    assert float(observation.scale) == pytest.approx(float(values.std(correction=0)), rel=1e-6)
    # The loss is then the normalised squared error of the VQ-VAE paper, halved, and a constant.
    a, image = outputs((4, 1, 8, 8)), batches[0]["image"]
    decoded = observation(a)
    error = ((a + 1) / 2 - image.double() / 255).square().sum((1, 2, 3))
    variance = float(observation.scale) ** 2
    expected = error / variance / 2 + 32 * math.log(2 * math.pi * variance)
    torch.testing.assert_close(-decoded.log_prob(image), expected, rtol=1e-6, atol=0)


def test_sigma_of_constant_images_is_one_grey_level() -> None:
    observation = Observation(GaussianLikelihood())
    observation.prepare(
        [{"image": torch.full((2, 1, 4, 4), 7, dtype=torch.uint8)}],
        LaneContext(seed=0, step=0, batch_size=2, lanes=1),
    )
    assert float(observation.scale) == pytest.approx(1 / 255)


def test_only_measured_scales_are_saved_with_the_weights() -> None:
    assert set(Observation(GaussianLikelihood(sigma="data")).state_dict()) == {"scale"}
    for config in (GaussianLikelihood(sigma=0.5), LaplaceLikelihood(scale=0.5), BernoulliLikelihood()):
        assert not Observation(config).state_dict()


def test_dssim_needs_images_as_large_as_its_window() -> None:
    check_dssim(1.0, Spec(1, 11, 11))
    check_dssim(0.0, Spec(1, 8, 8))
    with pytest.raises(UserError, match="at least 11x11 and these are 8x12"):
        check_dssim(1.0, Spec(1, 8, 12))
