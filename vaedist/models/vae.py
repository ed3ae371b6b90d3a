"""Variational autoencoder with a Gaussian latent vector.

    loss = -log p(x | z) + beta KL(q(z | x) || N(0, 1)),   z ~ q(z | x) = N(mu(x), diag s(x)^2)

in nats per image, summed over pixels and latent dimensions, so `beta: 1` is the negative evidence lower bound.
Kingma and Welling, "Auto-encoding variational Bayes". A beta-VAE (Higgins et al.) is another `beta`; a warmed-up one is
`beta: {start: 0, end: 1, steps: 2000}`. `dssim` adds structural dissimilarity to what is minimised, as its own term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vaedist.config import OVERRIDE, Spec, Strict, Weight, ramp_end, weight_at
from vaedist.context import Batch, Context, generator
from vaedist.models.contract import Likelihood, Variant
from vaedist.nets.bodies import Body, Conv, decoder, encoder
from vaedist.nets.divergences import DiagonalGaussian
from vaedist.nets.likelihoods import BernoulliLikelihood, LikelihoodConfig, Observation, check_dssim


class Config(Strict):
    """Settings of `kind: vae`."""

    kind: Literal["vae"] = "vae"
    encoder: Body = Conv()
    decoder: Body | None = Field(None, description="Default: as the encoder, mirrored.")
    latent: int = Field(32, ge=1, description="Dimensions of z.")
    likelihood: LikelihoodConfig = BernoulliLikelihood()
    beta: Weight = Field(1.0, description="Weight of the rate.", json_schema_extra=OVERRIDE)
    dssim: float = Field(
        0.0, ge=0, description="Weight of pixels * (1 - SSIM) / 2.", json_schema_extra=OVERRIDE
    )


class Model(Variant):
    """See the module."""

    latent = "vector"
    reconstructs = True
    samples = True
    units: ClassVar[Mapping[str, str]] = {
        "loss": "nats",
        "distortion": "nats",
        "rate": "nats",
        "dssim": "pixels * (1 - SSIM) / 2",
        "mse": "squared grey value in [0, 1], per pixel",
    }
    why_not: ClassVar[Mapping[str, str]] = {"codes": "its latent is a vector of numbers, not a map of codes"}

    config: Config

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__()
        check_dssim(config.dssim, spec)
        self.config, self.spec = config, spec
        self.encoder = encoder(config.encoder, spec, 2 * config.latent, vector=True)
        self.decoder = decoder(config.decoder or config.encoder, spec, config.latent, vector=True)
        self.observation = Observation(config.likelihood)

    @property
    def prepare_batches(self) -> int:  # type: ignore[override]
        return 4 if self.observation.measured else 0

    def prepare(self, first_batches: Sequence[Batch], ctx: Context) -> None:
        self.observation.prepare(first_batches, ctx)

    @property
    def schedule_end(self) -> int:
        return ramp_end(self.config.beta)

    def forward(self, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        image = batch["image"]
        posterior = self.encode(image)
        z = posterior.sample(ctx.noise("z", posterior.mean.shape))
        decoded = self.observation(self.decoder(z))
        distortion = -decoded.log_prob(image)
        rate = posterior.kl().flatten(1).sum(1)
        beta = weight_at(self.config.beta, ctx.step, ctx.training)
        terms = {"distortion": distortion, "rate": rate, "mse": decoded.mse(image).detach()}
        loss = distortion + beta * rate
        if self.config.dssim > 0:
            terms["dssim"] = decoded.dssim(image)
            loss = loss + self.config.dssim * terms["dssim"]
        return {"loss": loss, **terms}

    def encode(self, image: Tensor, label: Tensor | None = None) -> DiagonalGaussian:
        return DiagonalGaussian.from_network(self.encoder(self.to_network(image)))

    def decode(self, z: Tensor, label: Tensor | None = None) -> Likelihood:
        decoded: Likelihood = self.observation(self.decoder(z))
        return decoded

    def reconstruct(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        return self.decode(self.encode(image).mean).mean

    @torch.no_grad()
    def sample(
        self, n: int, *, seed: int = 0, first: int = 0, label: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        noise = [
            torch.randn(self.config.latent, generator=generator("sample", seed, i))
            for i in range(first, first + n)
        ]
        weight = next(self.parameters())
        z = temperature * torch.stack(noise).to(weight.device, weight.dtype)
        return torch.cat([self.decode(part).mean for part in z.split(64)])
