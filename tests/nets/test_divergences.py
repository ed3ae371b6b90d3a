"""Closed forms against torch.distributions and Monte Carlo."""

from __future__ import annotations

import torch
from torch.distributions import Normal, kl_divergence

from vaedist.context import generator
from vaedist.nets.divergences import DiagonalGaussian


def posterior(shape: tuple[int, ...] = (5, 7)) -> DiagonalGaussian:
    draw = generator("posterior", shape)
    mean = torch.randn(shape, generator=draw, dtype=torch.float64)
    return DiagonalGaussian(mean, torch.randn(shape, generator=draw, dtype=torch.float64))


def test_kl_is_the_closed_form_per_dimension() -> None:
    for shape in [(5, 7), (2, 3, 4, 4)]:
        q = posterior(shape)
        expected = kl_divergence(Normal(q.mean, q.std), Normal(torch.zeros_like(q.mean), 1.0))
        assert q.kl().shape == shape
        torch.testing.assert_close(q.kl(), expected, rtol=1e-12, atol=1e-12)


def test_kl_of_the_prior_is_zero_and_its_gradient_too() -> None:
    mean = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    log_variance = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    kl = DiagonalGaussian(mean, log_variance).kl()
    kl.sum().backward()
    assert float(kl.detach().abs().max()) == 0
    assert mean.grad is not None and float(mean.grad.abs().max()) == 0
    assert log_variance.grad is not None and float(log_variance.grad.abs().max()) == 0


def test_kl_is_the_mean_log_ratio_of_its_samples() -> None:
    q = DiagonalGaussian(torch.tensor([[0.7]]).double(), torch.tensor([[-1.2]]).double())
    noise = torch.randn(200_000, 1, generator=generator("kl"), dtype=torch.float64)
    z = q.sample(noise)
    ratio = Normal(q.mean, q.std).log_prob(z) - Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(ratio.mean(), q.kl().sum(), rtol=0.02, atol=0)


def test_samples_are_reparameterised() -> None:
    mean = torch.tensor([[0.3, -2.0]], dtype=torch.float64, requires_grad=True)
    log_variance = torch.tensor([[0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([[1.5, -0.5]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m, v: DiagonalGaussian(m, v).sample(noise), (mean, log_variance))
    expected = mean + (log_variance / 2).exp() * noise
    torch.testing.assert_close(DiagonalGaussian(mean, log_variance).sample(noise), expected)


def test_extreme_log_variances_stay_finite() -> None:
    q = DiagonalGaussian(torch.zeros(1, 2), torch.tensor([[-1e4, 1e4]]))
    assert q.kl().isfinite().all() and q.sample(torch.ones(1, 2)).isfinite().all()


def test_from_network_takes_the_first_half_as_mean_and_leaves_half_precision() -> None:
    q = DiagonalGaussian.from_network(torch.arange(8, dtype=torch.bfloat16).view(1, 8))
    assert q.mean.tolist() == [[0, 1, 2, 3]] and q.log_variance.tolist() == [[4, 5, 6, 7]]
    assert q.kl().dtype == torch.float32
