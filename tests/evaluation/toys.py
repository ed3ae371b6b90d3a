"""Small models whose likelihood is known in closed form, for the tests of the estimators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from vaedist.config.job import Spec
from vaedist.config.settings import Strict
from vaedist.core.context import Batch
from vaedist.models.contract import Likelihood, Variant
from vaedist.nets.divergences import DiagonalGaussian
from vaedist.nets.likelihoods import Bernoulli, Gaussian


class Config(Strict):
    kind: Literal["toy"] = "toy"


class Linear(Variant):
    """x = W z + b + sigma e on the [0, 1] scale, z standard normal, with a posterior `spread` times too wide.

    The columns of W are orthogonal, so the exact posterior N(M^-1 W^T (x - b) / sigma^2, M^-1) with
    M = 1 + W^T W / sigma^2 is diagonal; at `spread` 1 the model's posterior is that one.
    """

    latent = "vector"
    reconstructs = True

    def __init__(
        self, spec: Spec, latent: int = 3, sigma: float = 0.1, spread: float = 1.0, bernoulli: bool = False
    ) -> None:
        super().__init__()
        self.config, self.spec, self.latent_shape = Config(), spec, (latent,)
        generator = np.random.Generator(np.random.PCG64(4))
        columns, _ = np.linalg.qr(generator.normal(size=(spec.pixels, latent)))
        scale = np.linspace(0.5, 0.1, latent)
        self.weight = nn.Parameter(torch.from_numpy(columns * scale))
        self.bias = nn.Parameter(torch.from_numpy(generator.uniform(0.3, 0.7, spec.pixels)))
        self.sigma, self.spread, self.bernoulli = sigma, spread, bernoulli

    def covariance(self) -> Tensor:
        """Of x."""
        return self.weight @ self.weight.T + self.sigma**2 * torch.eye(self.spec.pixels).double()

    def prior(self, label: Tensor | None = None) -> DiagonalGaussian:
        zero = torch.zeros(1, *self.latent_shape, dtype=torch.float64)
        return DiagonalGaussian(zero, zero)

    def encode(self, image: Tensor, label: Tensor | None = None) -> DiagonalGaussian:
        x = image.double().flatten(1) / 255 - self.bias
        precision = 1 + self.weight.square().sum(0) / self.sigma**2
        mean = x @ self.weight / self.sigma**2 / precision
        return DiagonalGaussian(mean, (self.spread**2 / precision).log().expand_as(mean))

    def decode(self, z: Tensor, label: Tensor | None = None) -> Likelihood:
        location = (z @ self.weight.T + self.bias).view(-1, *self.spec.image_shape)
        if self.bernoulli:
            return Bernoulli(8 * location - 4)
        return Gaussian(2 * location - 1, torch.tensor(self.sigma))


def linear_images(spec: Spec, count: int, seed: int = 0) -> np.ndarray:
    """Grey images around the linear model's mean."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return np.clip(generator.normal(128, 40, (count, *spec.image_shape)), 0, 255).astype(np.uint8)


def batches(pixels: np.ndarray, size: int, labels: np.ndarray | None = None) -> Iterator[Batch]:
    """As `EvaluationStream` yields them: the last batch repeats the last sample and masks it."""
    count = len(pixels)
    labels = np.arange(count) % 2 if labels is None else labels
    for start in range(0, count, size):
        rows = np.arange(start, start + size)
        held = np.minimum(rows, count - 1)
        yield Batch(
            image=torch.from_numpy(pixels[held]),
            label=torch.from_numpy(labels[held]),
            key=[f"case_{i}" for i in held],
            sample=held.tolist(),
            mask=torch.from_numpy(rows < count),
        )
