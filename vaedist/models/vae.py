"""Variational autoencoder with a Gaussian latent: VAE, beta-VAE, conditional VAE, importance-weighted autoencoder.

    loss = -log p(x | z) + beta KL(q(z | x) || p(z)),   z ~ q(z | x) = N(mu(x), diag s(x)^2),   p(z) = N(0, 1)

in nats per image, summed over pixels and latent dimensions, so `beta: 1` is the negative evidence lower bound. Kingma
and Welling, "Auto-encoding variational Bayes". A beta-VAE (Higgins et al.) is another `beta`; a warmed-up one is
`beta: {start: 0, end: 1, steps: 2000}`. With `condition` all of it is given the label y (Sohn et al.).

`free_bits: f` (Kingma et al., "Improving variational inference with inverse autoregressive flow", equation 15) lets
each latent dimension j carry f nats for nothing, so that none is pressed to zero early: in training the rate becomes
sum_j max(f, mean of KL_j over the global batch). Validation has the plain one.

`num_importance: k` (Burda et al., "Importance weighted autoencoders", equation 8) draws k latents per image for the
tighter bound

    loss = -log 1/k sum_i exp(-distortion(z_i) - beta [log q(z_i | x) - log p(z_i)])

`dssim` adds structural dissimilarity to what is minimised, as its own term.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vaedist.config.job import Spec
from vaedist.config.loss_weights import ramp_end, weight_at
from vaedist.core.context import Batch, Context
from vaedist.models.bases.gaussian_autoencoder import GaussianAutoencoder
from vaedist.models.vae_config import Config
from vaedist.nets.divergences import DiagonalGaussian


class Model(GaussianAutoencoder):
    """See the module."""

    config: Config

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__(config, spec)
        self.batch_statistics |= config.free_bits > 0

    @property
    def schedule_end(self) -> int:
        return ramp_end(self.config.beta)

    def forward(self, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        config, k = self.config, self.config.num_importance
        image, target, label = self.inputs(batch, ctx)
        posterior = self.encode(image, label)
        assert isinstance(posterior, DiagonalGaussian)
        kl = posterior.kl().flatten(1)
        noise = ctx.noise("z", (len(image), k, *self.latent_shape)).flatten(0, 1)
        if k > 1:
            target = target.repeat_interleave(k, 0)
            label = None if label is None else label.repeat_interleave(k, 0)
            mean, log_variance = posterior.mean, posterior.log_variance
            posterior = DiagonalGaussian(mean.repeat_interleave(k, 0), log_variance.repeat_interleave(k, 0))
        z = posterior.sample(noise)
        decoded = self.observe(z, label, target, ctx)
        distortion = -decoded.log_prob(target)

        def per_image(values: Tensor) -> Tensor:
            return values.view(-1, k).mean(1)

        terms = {
            "distortion": per_image(distortion),
            "rate": kl.sum(1),
            "mse": per_image(decoded.mse(target).detach()),
        }
        beta = weight_at(config.beta, ctx.step, ctx.training)
        if k > 1:
            price = distortion + beta * (posterior.log_prob(z) - self.prior(label).log_prob(z))
            loss = math.log(k) - torch.logsumexp(-price.view(-1, k), 1)
        elif config.free_bits > 0 and ctx.training:
            loss = distortion + beta * ctx.mean(kl).clamp_min(config.free_bits).sum()
        else:
            loss = distortion + beta * terms["rate"]
        if config.dssim > 0:
            terms["dssim"] = per_image(decoded.dssim(target))
            loss = loss + config.dssim * terms["dssim"]
        return {"loss": loss, **terms}
