"""Base of autoencoders with a Gaussian latent: networks, posterior, prior, samples. A subclass adds the loss.

    class Config(GaussianAutoencoderConfig):
        kind: Literal["my_vae"] = "my_vae"

    class Model(GaussianAutoencoder):
        def forward(self, batch, ctx):
            image, target, label = self.inputs(batch, ctx)
            posterior = self.encode(image, label)
            z = posterior.sample(ctx.noise("z", posterior.mean.shape))
            distortion = -self.observe(z, label, target, ctx).log_prob(target)          # (B,) nats
            return {"loss": distortion + posterior.kl().flatten(1).sum(1), "distortion": distortion}

The latent is a vector (D,) or, with `latent: {kind: map, channels: n}`, a map (n, h, w) on the encoder's grid. With
`condition` labels enter the encoder, the decoder and perhaps the prior: see `vaedist.nets.conditioning`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vaedist.config.job import Spec
from vaedist.core.context import Batch, Context, generator
from vaedist.models.bases.gaussian_autoencoder_config import GaussianAutoencoderConfig, MapLatent
from vaedist.models.contract import Variant
from vaedist.nets.bodies import decoder, encoder, matching_grid
from vaedist.nets.conditioning import ClassPrior, LabelEmbedding, conditioned, drop_labels
from vaedist.nets.decoder_distribution import DecoderDistribution
from vaedist.nets.divergences import DiagonalGaussian, PointMass
from vaedist.nets.likelihoods import ObservationModel, check_dssim

__all__ = ["GaussianAutoencoder", "GaussianAutoencoderConfig", "MapLatent"]


class GaussianAutoencoder(Variant):
    """Base of a `Model` with a Gaussian latent.

    Args:
        config: Its settings.
        spec: Of the data.
        stochastic: Whether the encoder gives a variance too; without one its posterior is a point.

    Raises:
        UserError: the networks, the condition or `dssim` do not fit the data.
    """

    reconstructs = True
    samples = True
    units: ClassVar[Mapping[str, str]] = {
        "loss": "nats",
        "distortion": "nats",
        "rate": "nats",
        "dssim": "pixels * (1 - SSIM) / 2",
        "mse": "squared grey value in [0, 1], per pixel",
    }
    why_not: ClassVar[Mapping[str, str]] = {"codes": "its latent is made of numbers, not of codes"}

    config: GaussianAutoencoderConfig

    def __init__(self, config: GaussianAutoencoderConfig, spec: Spec, *, stochastic: bool = True) -> None:
        super().__init__()
        check_dssim(config.dssim, spec)
        self.config, self.spec, self.stochastic = config, spec, stochastic
        mirrored = config.decoder or config.encoder
        if isinstance(config.latent, MapLatent):
            self.latent = "map"
            self.latent_shape = (config.latent.channels, *matching_grid(config.encoder, mirrored, spec))
        else:
            self.latent, self.latent_shape = "vector", (config.latent,)
        channels, vector = self.latent_shape[0], self.latent == "vector"

        condition = config.condition
        self.conditional = condition is not None
        self.labels = LabelEmbedding(condition, spec) if condition else None
        size = self.labels.size if self.labels else 0
        extra = size if condition and condition.how == "concat" else 0
        down = encoder(
            config.encoder, spec, channels * (1 + stochastic), vector=vector, extra=extra
        )  # mean, and log-variance
        self.encoder = conditioned(down, condition, size, spec.image_shape)
        self.observation = ObservationModel(config.likelihood, spec)
        self.batch_statistics = self.observation.batch_statistics
        up = decoder(mirrored, spec, channels, vector=vector, extra=extra, channels=self.observation.outputs)
        self.decoder = conditioned(up, condition, size, self.latent_shape)
        per_class = condition is not None and condition.prior == "per_class"
        self.class_prior = ClassPrior(spec.classes, self.latent_shape) if per_class else None

    @property
    def prepare_batches(self) -> int:  # type: ignore[override]
        return 4 if self.observation.measured else 0

    def prepare(self, first_batches: Sequence[Batch], ctx: Context) -> None:
        self.observation.prepare(first_batches, ctx)

    def after_step(self, ctx: Context) -> dict[str, Tensor]:
        return self.observation.after_step(ctx)

    # The pieces of a loss

    def inputs(self, batch: Batch, ctx: Context) -> tuple[Tensor, Tensor, Tensor | None]:
        """Image, target, and labels, some of them dropped in training; None where the model is not conditional."""
        image = batch["image"]
        label = None
        if self.config.condition is not None:
            label, share = batch["label"], self.config.condition.dropout
            if ctx.training and share > 0:
                label = drop_labels(label, ctx.uniform("label", label.shape), share)
        return image, batch.get("target", image), label

    def observe(self, z: Tensor, label: Tensor | None, target: Tensor, ctx: Context) -> DecoderDistribution:
        """p(x | z) in a step on `target`, on which an optimal sigma is measured."""
        decoded: DecoderDistribution = self.observation(self.decoder(z, *self._code(label, z)), target, ctx)
        return decoded

    # Capabilities

    def prior(self, label: Tensor | None = None) -> DiagonalGaussian:
        if self.class_prior is not None:
            prior: DiagonalGaussian = self.class_prior(self._known(label, 1))
            return prior
        weight = next(self.parameters())
        zero = torch.zeros((1, *self.latent_shape), dtype=weight.dtype, device=weight.device)
        return DiagonalGaussian(zero, zero)

    def encode(self, image: Tensor, label: Tensor | None = None) -> DiagonalGaussian | PointMass:
        x = self.to_network(image)
        features = self.encoder(x, *self._code(label, x))
        if not self.stochastic:
            return PointMass(features)
        prior = None if self.class_prior is None else self.class_prior(self._known(label, image.shape[0]))
        return DiagonalGaussian.from_network(features, prior, self.config.start_sigma)

    def decode(self, z: Tensor, label: Tensor | None = None) -> DecoderDistribution:
        decoded: DecoderDistribution = self.observation(self.decoder(z, *self._code(label, z)))
        return decoded

    def reconstruct(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        return self.decode(self.encode(image, label).mean, label).mean

    @torch.no_grad()
    def sample(
        self, n: int, *, seed: int = 0, first: int = 0, label: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """See `Variant.sample`; label -1 asks for a sample without a class, where labels were dropped in training."""
        weight = next(self.parameters())
        draws = [generator("sample", seed, number) for number in range(first, first + n)]
        noise = torch.stack([torch.randn(self.latent_shape, generator=draw) for draw in draws])
        if self.labels is None:
            label = None
        elif label is None:
            drawn = [torch.randint(self.labels.classes, (), generator=draw) for draw in draws]
            label = torch.stack(drawn).to(weight.device)
        else:
            label = self.labels.check(label.to(weight.device))
        z = self.prior(label).sample(temperature * noise.to(weight.device, weight.dtype))
        parts = range(0, n, 64)
        labels = [None if label is None else label[start : start + 64] for start in parts]
        return torch.cat([self.decode(z[a : a + 64], y).mean for a, y in zip(parts, labels, strict=True)])

    def _known(self, label: Tensor | None, rows: int) -> Tensor:
        assert self.labels is not None
        return self.labels.resolve(label, rows, next(self.parameters()).device)

    def _code(self, label: Tensor | None, x: Tensor) -> tuple[Tensor, ...]:
        """What the bodies take beside `x`: the labels' codes, where the model is conditional."""
        return () if self.labels is None else (self.labels(self._known(label, x.shape[0])),)
