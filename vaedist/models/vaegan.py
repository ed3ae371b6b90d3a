"""VAE-GAN: an autoencoder whose errors are measured by a discriminator's features instead of pixels.

Larsen et al., "Autoencoding beyond pixels using a learned similarity metric", algorithm 1. With f(x) the features of
the discriminator D before its score, z ~ q(z | x) the latent of an image, x' its reconstruction and y the picture of a
z from the prior, the three networks minimise in turn

    discriminator   the adversarial loss of D(x) against D(x') and D(y), half of each (the paper: all of each)
    encoder         beta KL(q(z | x) || p(z)) + S
    decoder         style S + the generator's adversarial loss of x' and y, half of each

    S = 1/2 |f(x) - f(x')|^2,

which is -log N(f(x); f(x'), 1) up to a constant, in nats. The discriminator does not train on it: it would lower S by
features that distinguish nothing. Both pictures in S are augmented alike. `pixel` adds the likelihood's pixel-wise
distortion to encoder and decoder, and `dssim` its structural one; the paper has neither.

The `likelihood` says how the decoder's numbers are read as a picture, as it does in a VAE, so a run may start from one
with the same networks by `init_from: {run: VAE, map: {encoder: encoder, decoder: decoder}}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from vaedist.config.job import Spec
from vaedist.config.loss_weights import ramp_end, weight_at
from vaedist.config.settings import Strict
from vaedist.core.context import Batch, Context
from vaedist.core.errors import UserError
from vaedist.models.bases.gaussian_autoencoder import GaussianAutoencoder
from vaedist.models.vaegan_config import Config
from vaedist.nets.adversarial import UNITS, Discriminator
from vaedist.nets.decoder_distribution import DecoderDistribution

_ADVERSARIAL_TERMS = {
    "loss": "who is ahead, not how good",
    "similarity": "nats in the features of the day",
    **UNITS,
}


class Model(GaussianAutoencoder):
    """See the module."""

    phases = ("discriminator", "encoder", "decoder")
    units: ClassVar[Mapping[str, str]] = {**GaussianAutoencoder.units, **_ADVERSARIAL_TERMS}
    adversarial_terms: ClassVar[frozenset[str]] = frozenset(_ADVERSARIAL_TERMS)

    config: Config

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__(config, spec)
        self.discriminator = Discriminator(config, spec)

    @property
    def uncompiled(self) -> Mapping[str, str]:
        return {"discriminator": "its features are read, and R1 needs the gradient of a gradient"}

    @property
    def schedule_end(self) -> int:
        return ramp_end(self.config.beta)

    def parameters_of(self, phase: str) -> Iterable[nn.Parameter]:
        prefixes = {"discriminator": ("discriminator.",), "decoder": ("decoder.", "observation.")}
        rest = prefixes["discriminator"] + prefixes["decoder"]
        for name, parameter in self.named_parameters():
            if name.startswith(prefixes[phase]) if phase in prefixes else not name.startswith(rest):
                yield parameter

    def averaged(self, name: str) -> bool:
        return not name.startswith("discriminator.")

    def forward(self, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        image, target, label = self.inputs(batch, ctx)
        config, disc, real = self.config, self.discriminator, self.to_network(target)
        prior_noise = ctx.noise("prior", (len(image), *self.latent_shape)).to(real.dtype)
        noise = ctx.noise("z", prior_noise.shape)

        if ctx.phase == "discriminator":
            with torch.no_grad():
                z = self.encode(image, label).sample(noise)
                pictures = [_picture(self.decode(z, label)), _picture(self._decode_prior(prior_noise, label))]
            real_score, penalty = disc.real_scores(disc.augment_input(real, ctx, "real"), ctx)
            reconstructed, sampled = (
                disc(disc.augment_input(picture, ctx, name))
                for picture, name in zip(pictures, ("rebuilt", "painted"), strict=True)
            )
            loss = 0.5 * (disc.loss(real_score, reconstructed) + disc.loss(real_score, sampled))
            terms = {"loss": loss, **disc.score_statistics(real_score, sampled)}
            if penalty is not None:
                terms |= {"loss": loss + penalty, "r1": penalty.detach()}
            return terms

        if ctx.phase == "encoder":
            posterior = self.encode(image, label)
            decoded = self.observe(posterior.sample(noise), label, target, ctx)
            rate = posterior.kl().flatten(1).sum(1)
            loss = weight_at(config.beta, ctx.step, ctx.training) * rate
            terms = {"rate": rate, "mse": decoded.mse(target).detach()}
        else:
            with torch.no_grad():
                z = self.encode(image, label).sample(noise)
            decoded = self.observe(z, label, target, ctx)
            sampled = disc(
                disc.augment_input(_picture(self._decode_prior(prior_noise, label)), ctx, "painted")
            )
            loss, terms = torch.zeros_like(sampled), {}
        # The same noise name augments the two pictures whose features are compared alike.
        with torch.no_grad():
            real_score, real_features = disc.features(disc.augment_input(real, ctx, "real"))
        reconstructed, features = disc.features(disc.augment_input(_picture(decoded), ctx, "real"))
        terms["similarity"] = 0.5 * (features - real_features).square().sum(1)
        terms["distortion"] = -decoded.log_prob(target)
        loss = loss + config.pixel * terms["distortion"]
        if config.dssim > 0:
            terms["dssim"] = decoded.dssim(target)
            loss = loss + config.dssim * terms["dssim"]
        if ctx.phase == "encoder":
            return {"loss": loss + terms["similarity"], **terms}
        game = 0.5 * (
            disc.generator_loss(real_score, reconstructed) + disc.generator_loss(real_score, sampled)
        )
        return {
            "loss": loss + config.style * terms["similarity"] + game,
            "fake_score": sampled.detach(),
            **terms,
        }

    def after_step(self, ctx: Context) -> dict[str, Tensor]:
        if ctx.phase == "discriminator":
            self.discriminator.after_step()
        return self.observation.after_step(ctx) if ctx.phase == "decoder" else {}

    def _decode_prior(self, noise: Tensor, label: Tensor | None) -> DecoderDistribution:
        return self.decode(self.prior(label).sample(noise), label)

    def check_source(self, source: Strict, mapping: Mapping[str, str], where: str) -> None:
        if mapping and "decoder" not in mapping.values():
            return
        theirs = getattr(source, "likelihood", self.config.likelihood)
        if theirs != self.config.likelihood:
            raise UserError(
                f"{where}: its decoder was trained with the likelihood {theirs.model_dump()}, and this job reads its "
                f"numbers by {self.config.likelihood.model_dump()}: give both the same model.likelihood"
            )


def _picture(decoded: DecoderDistribution) -> Tensor:
    """(B, C, H, W) on the scale where [-1, 1] is black to white, with a gradient beyond it too."""
    return 2 * decoded.location - 1
