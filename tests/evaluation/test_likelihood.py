"""The estimator against likelihoods that are known: a linear Gaussian model, and a sum over every small image."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.evaluation.toys import Linear, batches, linear_images
from vaedist.config.job import Spec
from vaedist.config.model_section import model_config
from vaedist.core.context import SampleContext
from vaedist.core.errors import NotDefined, UserError
from vaedist.evaluation.metrics.likelihood import (
    BLOCK,
    bits_per_dim,
    estimate,
    importance_noise,
    likelihood_name,
    log_weights,
    measure_likelihood,
)
from vaedist.models.contract import build
from vaedist.nets.likelihoods import Bernoulli

SPEC = Spec(1, (4, 5))


def exact(model: Linear, pixels: np.ndarray, seed: int) -> Tensor:
    """log N(x; b, W W^T + sigma^2) of the dequantised images, less P log 255."""
    ctx = SampleContext(seed=seed, samples=range(len(pixels)))
    noise = ctx.uniform("dequantise", pixels.shape).double()
    x = (torch.from_numpy(pixels).double() + noise - 0.5).flatten(1) / 255
    normal = torch.distributions.MultivariateNormal(model.bias.detach(), model.covariance().detach())
    return normal.log_prob(x) - SPEC.pixels * math.log(255)


def nll(model: Linear, pixels: np.ndarray, draws: int, **options: int) -> Tensor:
    found = measure_likelihood(model, batches(pixels, 32), draws=draws, **options)
    return torch.tensor([row["nll"] for row in found.rows]).double()


def test_the_exact_posterior_gives_the_exact_likelihood_with_one_draw() -> None:
    """Up to the dequantisation noise, which the posterior does not see: at sigma 0.1 a grey level is nothing."""
    model, pixels = Linear(SPEC), linear_images(SPEC, 20)
    expected = -exact(model, pixels, seed=3)
    assert torch.allclose(nll(model, pixels, 1, seed=3), expected, atol=0.4)
    assert torch.allclose(nll(model, pixels, 500, seed=3), expected, atol=4e-3)


def test_the_bound_rises_with_the_draws_and_tends_to_the_likelihood() -> None:
    model, pixels = Linear(SPEC, spread=1.7), linear_images(SPEC, 64)
    expected = -exact(model, pixels, seed=0)
    gaps = [float((nll(model, pixels, draws) - expected).mean()) for draws in (1, 3, 10, 1000)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.5
    assert gaps[-1] == pytest.approx(0, abs=0.01)


def test_elbo_and_effective_samples() -> None:
    weights = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, -1e4, -1e4, -1e4]]).double()
    bound, elbo, effective = estimate(weights)
    assert bound.tolist() == pytest.approx([0.0, 5 - math.log(4)])
    assert elbo.tolist() == pytest.approx([0.0, (5 - 3e4) / 4])
    assert effective.tolist() == pytest.approx([4.0, 1.0])
    model, pixels = Linear(SPEC, spread=1.7), linear_images(SPEC, 16)
    found = measure_likelihood(model, batches(pixels, 16), draws=600)
    (batch,) = batches(pixels, 16)
    model.requires_grad_(False)
    posterior = model.encode(batch["image"])
    # The ELBO in closed form: E log p(x | z) of a linear Gaussian needs the posterior's mean and variance alone.
    noise = SampleContext(seed=0, samples=range(16)).uniform("dequantise", pixels.shape).double()
    x = (batch["image"].double() + noise - 0.5).flatten(1) / 255
    error = (x - posterior.mean @ model.weight.T - model.bias).square().sum(1)
    error = error + (posterior.log_variance.exp() * model.weight.square().sum(0)).sum(1)
    constant = SPEC.pixels * (0.5 * math.log(2 * math.pi * 0.01) + math.log(255))
    elbo = -error / 0.02 - constant - posterior.kl().sum(1)
    assert float(elbo.mean()) == pytest.approx(found.document()["elbo"]["mean"], abs=0.1)
    assert found.document()["elbo"]["mean"] < -found.document()["nll"]["mean"]


def test_black_and_white_images_are_a_probability() -> None:
    """Over all 2^4 images of two by two values, the estimates of p(x) sum to one."""
    spec = Spec(1, (2, 2))
    model = Linear(spec, latent=2, bernoulli=True, spread=1.1, sigma=1.0)
    pixels = np.array([*itertools.product((0, 255), repeat=4)], np.uint8).reshape(16, 1, 2, 2)
    found = measure_likelihood(model, batches(pixels, 16), draws=2000)
    assert found.name == "binary"
    assert sum(math.exp(-row["nll"]) for row in found.rows) == pytest.approx(1, abs=0.01)
    document = found.document()
    assert document["bits_per_dim"]["mean"] == pytest.approx(document["nll"]["mean"] / (4 * math.log(2)))
    assert document["not_defined"] == {}


def test_grey_images_under_a_bernoulli_are_a_surrogate() -> None:
    model = Linear(SPEC, bernoulli=True)
    pixels = np.where(linear_images(SPEC, 20) > 127, 255, 0).astype(np.uint8)
    assert measure_likelihood(model, batches(pixels, 7), draws=2).name == "binary"
    pixels[13, 0, 2, 2] = 9  # one grey value in one image
    found = measure_likelihood(model, batches(pixels, 7), draws=2)
    document = found.document()
    assert found.name == "surrogate"
    assert document["bits_per_dim"] is None
    assert (
        "not defined, because a Bernoulli likelihood of grey images"
        in document["not_defined"]["bits_per_dim"]
    )


def test_a_likelihood_that_does_not_say_is_a_surrogate() -> None:
    class Silent:
        pass

    decoded = Bernoulli(torch.zeros(1, 1, 2, 2))
    assert likelihood_name(decoded, bilevel=True) == "binary"
    assert likelihood_name(Silent(), bilevel=True) == "surrogate"  # type: ignore[arg-type]


def test_neither_batch_nor_chunk_nor_count_changes_a_draw() -> None:
    model, pixels = Linear(SPEC, spread=1.3), linear_images(SPEC, 9)
    (whole,) = batches(pixels, 9)
    expected, _ = log_weights(model, whole, draws=130, seed=1, chunk=130)
    for size, chunk in ((2, 7), (5, 64), (9, 1)):
        parts = [
            log_weights(model, batch, draws=130, seed=1, chunk=chunk)[0][batch["mask"]]
            for batch in batches(pixels, size)
        ]
        assert torch.allclose(torch.cat(parts), expected, rtol=1e-12)
    fewer, _ = log_weights(model, whole, draws=60, seed=1)
    assert torch.allclose(fewer, expected[:, :60], rtol=1e-12)
    other, _ = log_weights(model, whole, draws=60, seed=1, number=1)
    assert not torch.allclose(other, fewer)


def test_noise_of_a_block_is_drawn_once() -> None:
    ctx = SampleContext(seed=0, samples=[4, 2])
    whole = importance_noise(ctx, (3,), 0, 2 * BLOCK + 5)
    assert whole.shape == (2, 2 * BLOCK + 5, 3)
    assert (importance_noise(ctx, (3,), 30, BLOCK + 9) == whole[:, 30 : BLOCK + 9]).all()
    assert len(torch.unique(whole)) == whole.numel()


def test_rounds_show_the_spread_of_the_estimator() -> None:
    model, pixels = Linear(SPEC, spread=1.7), linear_images(SPEC, 12)
    found = measure_likelihood(model, batches(pixels, 5), draws=20, rounds=4)
    document = found.document()
    assert len(found.rounds) == 4 == len(set(found.rounds))
    assert document["nll"]["mean"] == pytest.approx(np.mean(found.rounds))
    single = measure_likelihood(model, batches(pixels, 12), draws=20)
    assert single.rounds[0] == pytest.approx(found.rounds[0])


def test_the_class_reaches_every_part_of_a_conditional_model() -> None:
    """A prior, posterior and decoder that know the class: the exact likelihood of each class's own model."""

    class Classes(Linear):
        conditional = True

        def _shift(self, label: Tensor | None) -> Tensor:
            assert label is not None
            return 0.2 * label.double()[:, None]

        def encode(self, image, label=None):  # type: ignore[no-untyped-def]
            posterior = super().encode(image)
            posterior.mean = posterior.mean + self._shift(label)
            return posterior

        def prior(self, label=None):  # type: ignore[no-untyped-def]
            prior = super().prior()
            prior.mean = prior.mean + self._shift(label)
            return prior

        def decode(self, z, label=None):  # type: ignore[no-untyped-def]
            return super().decode(z - self._shift(label))

    pixels = linear_images(SPEC, 10)
    plain = nll(Linear(SPEC), pixels, 40)
    assert torch.allclose(nll(Classes(SPEC), pixels, 40), plain, rtol=1e-6)


def test_what_has_no_latent_density_says_why() -> None:
    section = {
        "kind": "vqvae",
        "encoder": {"kind": "conv", "width": 8, "depth": 0, "downsample": 2},
        "codebook": {"kind": "ema", "codes": 4, "dim": 2},
    }
    model = build(model_config(section), Spec(1, (4, 4)), seed=0).eval()
    with pytest.raises(NotDefined, match="encode is not defined, because"):
        measure_likelihood(model, batches(linear_images(Spec(1, (4, 4)), 3), 3))
    with pytest.raises(NotDefined, match="no image"):
        measure_likelihood(Linear(SPEC), [])
    noisy = [{**batch, "target": batch["image"]} for batch in batches(linear_images(SPEC, 3), 3)]
    with pytest.raises(NotDefined, match="a denoiser is shown another image"):
        measure_likelihood(Linear(SPEC), noisy)


def test_a_damaged_model_names_the_image() -> None:
    model = Linear(SPEC)
    with torch.no_grad():
        model.bias.fill_(math.nan)
    with pytest.raises(UserError, match="likelihood of case_0 is not finite"):
        measure_likelihood(model, batches(linear_images(SPEC, 3), 3), draws=2)


def test_bits_per_dim() -> None:
    assert bits_per_dim(784 * math.log(2), 784) == pytest.approx(1)
    assert bits_per_dim(math.log(256), 1) == pytest.approx(8)
