"""The rate and its parts against closed forms, and the aggregate posterior against laws that are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.evaluation.toys import Linear, batches, linear_images
from vaedist.config.job import Spec
from vaedist.core.context import generator
from vaedist.core.errors import NotDefined
from vaedist.evaluation.metrics import latents as module
from vaedist.evaluation.metrics.latents import (
    Latents,
    active_units,
    collect_latents,
    latent_statistics,
    rate_split,
)
from vaedist.models.contract import Variant
from vaedist.nets.divergences import DiagonalGaussian

SPEC = Spec(1, (4, 5))


def made(
    mean: Tensor,
    variance: Tensor | None,
    labels: Tensor | None = None,
    prior: tuple[Tensor, Tensor] | None = None,
) -> Latents:
    """Latents with draws, a standard normal prior by default."""
    mean = mean.double()
    noise = torch.randn(mean.shape, generator=generator("test"), dtype=torch.float64)
    return Latents(
        mean=mean,
        log_variance=None if variance is None else variance.double().log().expand_as(mean),
        samples=mean if variance is None else mean + variance.double().sqrt() * noise,
        prior_mean=torch.zeros_like(mean) if prior is None else prior[0],
        prior_log_variance=torch.zeros_like(mean) if prior is None else prior[1],
        labels=torch.zeros(len(mean), dtype=torch.int64) if labels is None else labels,
        keys=[str(i) for i in range(len(mean))],
        shape=tuple(mean.shape[1:]),
    )


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=generator("normal", seed), dtype=torch.float64)


def test_the_parts_sum_to_the_rate() -> None:
    latents = made(normal(200, 4) * torch.tensor([2.0, 1.0, 0.5, 0.0]), torch.tensor([0.1, 0.5, 1.0, 1.0]))
    found = rate_split(latents)
    parts = [found[name] for name in ("mutual_information", "total_correlation", "dimension_wise_kl")]
    assert sum(parts) == pytest.approx(found["rate"], abs=1e-9)
    assert found["marginal_kl"] == pytest.approx(
        found["total_correlation"] + found["dimension_wise_kl"], abs=1e-9
    )
    assert found["rate"] == pytest.approx(float(latents.kl().sum()), rel=0.1)  # a mean over draws of it
    assert found["mutual_information_limit"] == pytest.approx(math.log(200))


def test_gaussian_codes_have_a_known_split() -> None:
    """mu ~ N(0, C - s^2), z | mu ~ N(mu, s^2): q(z) = N(0, C), so all parts have closed forms."""
    rho, s = 0.8, 0.6
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)
    factor = torch.linalg.cholesky(covariance - s**2 * torch.eye(2) * (1 - rho))
    mean = normal(2000, 2) @ factor.T
    variance = torch.full((2,), s**2 * (1 - rho), dtype=torch.float64)
    found = rate_split(made(mean, variance))
    information = 0.5 * (torch.logdet(covariance) - variance.log().sum())
    assert found["total_correlation"] == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.05)
    assert found["dimension_wise_kl"] == pytest.approx(0, abs=0.02)
    assert found["mutual_information"] == pytest.approx(float(information), abs=0.05)


def test_posteriors_that_separate_every_image_carry_log_n() -> None:
    found = rate_split(made(torch.arange(64.0)[:, None] * 100, torch.tensor([1e-4])))
    assert found["mutual_information"] == pytest.approx(math.log(64), abs=1e-9)
    assert found["mutual_information"] == pytest.approx(found["mutual_information_limit"], abs=1e-9)


def test_a_collapsed_posterior_has_no_part() -> None:
    found = rate_split(made(torch.zeros(50, 3), torch.ones(3)))
    assert all(
        found[name] == pytest.approx(0, abs=1e-9)
        for name in ("rate", "mutual_information", "total_correlation", "dimension_wise_kl")
    )


def test_with_a_prior_per_class_the_mixtures_are_those_of_the_classes() -> None:
    """Posteriors equal to their class's prior carry nothing beyond the class; without it they separate the two."""
    labels = torch.arange(200) % 2
    place = 6.0 * labels[:, None].double().expand(200, 2)
    latents = made(place, torch.ones(2), labels, (place, 0 * place))
    within = rate_split(latents, classes=True)
    assert within["mutual_information"] == pytest.approx(0, abs=1e-9)
    assert within["rate"] == pytest.approx(0, abs=1e-9)
    assert within["mutual_information_limit"] == pytest.approx(math.log(100))
    assert rate_split(latents)["mutual_information"] == pytest.approx(math.log(2), abs=0.02)
    assert latents.kl().abs().max() < 1e-12
    assert latents.whitened().mean(0).abs().max() < 0.3


def test_a_large_split_is_thinned_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    latents = made(normal(300, 2), torch.tensor([0.2, 0.9]))
    whole = rate_split(latents)
    monkeypatch.setattr(module, "_CHUNK_TERMS", 1000)
    assert rate_split(latents) == pytest.approx(whole, rel=1e-12)
    monkeypatch.setattr(module, "_SPLIT_WORK", 2 * 150**2)
    thinned = rate_split(latents)
    assert thinned["images"] == 150
    assert thinned["mutual_information_limit"] == pytest.approx(math.log(150))


def test_kl_by_dimension_is_torch_s() -> None:
    prior = (normal(30, 3, 1), normal(30, 3, 2))
    latents = made(normal(30, 3), torch.tensor([0.2, 1.5, 1.0]), prior=prior)
    q = torch.distributions.Normal(latents.mean, (latents.log_variance / 2).exp())
    p = torch.distributions.Normal(latents.prior_mean, (latents.prior_log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(q, p).mean(0)
    torch.testing.assert_close(latents.kl(), expected, rtol=1e-12, atol=1e-12)


def test_active_units() -> None:
    mean = normal(1000, 4) * torch.tensor([1.0, 0.2, 0.05, 0.0])
    assert active_units(made(mean, torch.ones(4) * 0.5)) == (2, 4)
    # A class that moves mean and prior alike says nothing: its variance alone would count it.
    labels = torch.arange(1000) % 2
    place = labels[:, None].double().expand(1000, 1)
    assert active_units(made(place, torch.ones(1), labels, (place, 0 * place))) == (0, 1)
    channels = Latents(**{**vars(made(mean, torch.ones(4) * 0.5)), "shape": (2, 1, 2)})
    assert active_units(channels) == (1, 2)


def test_moments_and_mmd_see_a_posterior_that_is_not_the_prior() -> None:
    right = latent_statistics(made(normal(500, 5) * 0.6, torch.full((5,), 0.64)))
    assert right["mean_rms"] < 0.1
    assert right["std_mean"] == pytest.approx(1, abs=0.05)
    assert abs(right["mmd"]) < 4 * right["mmd_prior_spread"]
    narrow = latent_statistics(made(normal(500, 5) * 0.3, torch.full((5,), 0.16)))
    assert narrow["std_largest"] < 0.6
    assert narrow["mmd"] > 10 * narrow["mmd_prior_spread"]
    mixed = normal(500, 1).expand(500, 5)
    assert latent_statistics(made(mixed * 0.8, torch.full((5,), 0.36)))[
        "correlation_largest"
    ] == pytest.approx(0.64, abs=0.1)


def test_collect_takes_every_image_once() -> None:
    model, pixels = Linear(SPEC).requires_grad_(False), linear_images(SPEC, 23)
    found = collect_latents(model, batches(pixels, 5), seed=3)
    whole = collect_latents(model, batches(pixels, 23), seed=3)
    assert found.keys == [f"case_{i}" for i in range(23)]
    posterior = model.encode(torch.from_numpy(pixels))
    torch.testing.assert_close(found.mean, posterior.mean)
    torch.testing.assert_close(found.log_variance, posterior.log_variance)
    for name in ("mean", "log_variance", "samples", "prior_mean", "labels"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    assert not torch.equal(collect_latents(model, batches(pixels, 23), seed=4).samples, whole.samples)
    document = latent_statistics(found)
    assert sum(document["kl_by_dimension"]) == pytest.approx(float(posterior.kl().sum(1).mean()))
    assert document["split"]["images"] == 23


class Points(Linear):
    """A deterministic encoder, as of an MMD-VAE."""

    def encode(self, image, label=None):  # type: ignore[no-untyped-def]
        from vaedist.nets.divergences import PointMass

        return PointMass(super().encode(image).mean)


def test_a_deterministic_encoder_has_moments_and_no_rate() -> None:
    found = collect_latents(Points(SPEC), batches(linear_images(SPEC, 23), 5))
    assert found.log_variance is None
    assert torch.equal(found.samples, found.mean)
    document = latent_statistics(found)
    assert "split" not in document
    assert "deterministic" in document["not_defined"]["rate"]
    assert document["std_mean"] > 0
    with pytest.raises(NotDefined, match="deterministic"):
        rate_split(found)


def test_maps_are_flattened() -> None:
    class Maps(Linear):
        latent = "map"

        def encode(self, image, label=None):  # type: ignore[no-untyped-def]
            flat = super().encode(image)
            mean, log_variance = (x.reshape(-1, 2, 1, 2) for x in (flat.mean, flat.log_variance))
            return DiagonalGaussian(mean, log_variance)

        def prior(self, label=None):  # type: ignore[no-untyped-def]
            zero = torch.zeros(1, 2, 1, 2, dtype=torch.float64)
            return DiagonalGaussian(zero, zero)

    found = collect_latents(Maps(SPEC, latent=4), batches(linear_images(SPEC, 9), 4))
    assert (found.shape, found.mean.shape, found.samples.shape) == ((2, 1, 2), (9, 4), (9, 4))
    assert latent_statistics(found)["units"] == 2


def test_what_has_no_posterior_says_why() -> None:
    class Codes(Linear):
        latent = "codes"
        why_not: ClassVar[Mapping[str, str]] = {"encode": "its latent is made of codes"}

    with pytest.raises(NotDefined, match="encode is not defined, because its latent is made of codes"):
        collect_latents(Codes(SPEC), batches(linear_images(SPEC, 3), 3))
    model: Variant = Linear(SPEC)
    with pytest.raises(NotDefined, match="no image"):
        collect_latents(model, [])


def test_numbers_are_plain() -> None:
    document = latent_statistics(collect_latents(Linear(SPEC), batches(linear_images(SPEC, 9), 4)))
    assert all(isinstance(value, (int, float)) for value in document["split"].values())
    assert np.isfinite(document["kl_by_dimension"]).all()
