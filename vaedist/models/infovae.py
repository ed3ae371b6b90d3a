"""InfoVAE and MMD-VAE: a latent that is to keep its information, and whose whole, not each part, is to be the prior.

    loss = -log p(x | z) + (1 - alpha) KL(q(z | x) || p(z)) + (alpha + lambda - 1) MMD^2(q(z), p(z))

in nats per image, summed over pixels and latent dimensions, with q(z) the latents of the global batch and as many
draws from p(z). Zhao et al., "InfoVAE: balancing learning and inference in variational autoencoders", equation 6.
`mmd_weight` is lambda: the default kernel's MMD is about 1 where the latents are wrong, against hundreds of nats of
distortion.

| name | alpha | lambda |
|---|---|---|
| VAE | 0 | 1 |
| InfoVAE | less than 1 | more than 1 - alpha |
| MMD-VAE | 1 | any |

An MMD-VAE has no KL term, and there alone the encoder may be `deterministic`: its latents are points, as in Tolstikhin
et al., "Wasserstein auto-encoders", and rates and likelihood bounds are not defined. The MMD is a statistic of the
batch: of two batches of one split it is not the same number, and a larger batch has less noise.

`dssim` adds structural dissimilarity to what is minimised, as its own term.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from vaedist.config.job import Spec
from vaedist.core.context import Batch, Context
from vaedist.core.errors import UserError
from vaedist.models.bases.gaussian_autoencoder import GaussianAutoencoder
from vaedist.models.infovae_config import Config
from vaedist.nets.divergences import mmd


class Model(GaussianAutoencoder):
    """See the module."""

    units: ClassVar[Mapping[str, str]] = {**GaussianAutoencoder.units, "mmd": "squared kernel distance"}

    config: Config

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__(config, spec, stochastic=not config.deterministic)
        self.batch_statistics = True

    def forward(self, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        config = self.config
        image, target, label = self.inputs(batch, ctx)
        posterior = self.encode(image, label)
        z = posterior.sample(ctx.noise("z", posterior.mean.shape))
        decoded = self.observe(z, label, target, ctx)
        terms = {
            "distortion": -decoded.log_prob(target),
            "mse": decoded.mse(target).detach(),
            "mmd": self._mmd(z, label, batch, ctx),
        }
        loss = terms["distortion"] + (config.alpha + config.mmd_weight - 1) * terms["mmd"]
        if not config.deterministic:
            terms["rate"] = posterior.kl().flatten(1).sum(1)
            if config.alpha < 1:
                loss = loss + (1 - config.alpha) * terms["rate"]
        if config.dssim > 0:
            terms["dssim"] = decoded.dssim(target)
            loss = loss + config.dssim * terms["dssim"]
        return {"loss": loss, **terms}

    def _mmd(self, z: Tensor, label: Tensor | None, batch: Batch, ctx: Context) -> Tensor:
        """Of the global batch, a scalar; rows that only pad the last batch of an evaluation do not count."""
        drawn = self.prior(label).sample(ctx.noise("prior", z.shape).to(z.device))
        ours, theirs = ctx.gather(z), ctx.gather(drawn)
        if "mask" in batch:
            real = ctx.gather(batch["mask"].to(torch.uint8)).bool()
            ours, theirs = ours[real], theirs[real]
        if len(ours) > 1:
            return mmd(ours, theirs, self.config.kernel)
        if ctx.training:
            raise UserError("train.batch_size is 1, but MMD compares at least two latents: raise it")
        return z.new_zeros(())  # one image is left for the last batch of an evaluation
