"""Likelihoods p(x | z): the distribution of an image, given the decoder's output.

The decoder's output has -1 for black and 1 for white; the image is uint8; `mean` and `sample` are in [0, 1]. All of it
runs in fp32 (fp64 for fp64 models) outside autocast and is summed over the P = C*H*W values of an image, in nats.

| kind | log p(x), x in [0, 1], a = network output | evidence |
|---|---|---|
| `bernoulli` | sum of x log s(a) + (1 - x) log(1 - s(a)), s = sigmoid | `binary` |
| `gaussian` | sum of log N(x; (a + 1) / 2, sigma^2) | `density` |
| `laplace` | sum of log Laplace(x; (a + 1) / 2, scale) | `density` |
| `logistic` | log-probabilities of the 256 levels: see `vaedist.nets.discretized_logistic` | `discrete` |

`evidence` says what `log_prob` is. `discrete` is the log-probability of the stored bytes. `binary` takes grey values as
probabilities, the expected log-likelihood of their coin flips: a log-probability only for black-and-white images, else
a surrogate. `density` is that of a grey value, so it may be positive; with noise that fills the gaps between
levels (`dequantized_log_prob`) it bounds a log-probability from below (Theis et al., "A note on the evaluation of
generative models", section 3.1).

`sigma` of the Gaussian, on the [0, 1] scale:

| sigma | what it is |
|---|---|
| a number | fixed |
| `data` | std of the training images' values around their mean |
| `learned` | one trained number |
| `predicted` | one for each value, from the decoder, which emits twice the channels |
| `optimal` | the maximum-likelihood one of each global batch: sigma^2 = mean (x - m)^2 + r^2, with gradient |

`data` is measured once before step 1 and kept with the weights; it is the "normalised" squared error of the VQ-VAE
paper (van den Oord et al., "Neural discrete representation learning"). `optimal` needs no weight between errors and
rate (Rybkin et al., "Simple and effective VAE training with calibrated decoders"); outside training it is the
running mean of the training steps' sigma^2, kept with the weights, and never fitted to the images under evaluation.

r = 1 / (255 sqrt(12)) is the std of rounding to bytes. It is part of the optimal sigma because the images were rounded,
and learned and predicted ones stay above it: below it, a density would grow by fitting the rounding alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaedist.config.job import Spec
from vaedist.core.context import Batch, Context
from vaedist.core.errors import UserError
from vaedist.nets.decoder_distribution import DecoderDistribution, clamp_to_open_interval, to_unit_range
from vaedist.nets.discretized_logistic import DiscretizedLogistic
from vaedist.nets.likelihoods_config import (
    BernoulliLikelihood,
    GaussianLikelihood,
    LaplaceLikelihood,
    LikelihoodConfig,
    LogisticLikelihood,
)
from vaedist.nets.ssim import WINDOW_SIDE

ROUNDING = 1 / (255 * math.sqrt(12))
"""Standard deviation of rounding to bytes, on the [0, 1] scale."""

_START = 0.1  # sigma of an untrained decoder
_DECAY = 0.99  # decay of the stored optimal variance


class Bernoulli(DecoderDistribution):
    """Logits."""

    evidence = "binary"
    name = "bernoulli"

    @property
    def location(self) -> Tensor:
        return torch.sigmoid(self.output)

    def log_prob_values(self, x: Tensor) -> Tensor:
        return -functional.binary_cross_entropy_with_logits(self.output, x, reduction="none")

    def sample(self, noise: Tensor) -> Tensor:
        """(B, C, H, W) of 0 and 1, from uniform noise on [0, 1)."""
        return (noise < self.mean).to(self.output.dtype)


class _Density(DecoderDistribution):
    """A density over the grey values."""

    evidence = "density"

    def dequantized_log_prob(self, image: Tensor, noise: Tensor) -> Tensor:
        """(B,) nats of log p((image + noise - 1/2) / 255) - P log 255, for uniform noise on [0, 1).

        Its mean over the noise is a lower bound on the log-probability of the bytes under the discretised
        density, which gives each of the 256 levels the mass of the width 1 / 255 around it.
        """
        assert image.dtype == torch.uint8 and image.shape == noise.shape
        with torch.autocast(image.device.type, enabled=False):
            x = (image.to(self.output.dtype) + noise.to(self.output.dtype) - 0.5) / 255
            return (self.log_prob_values(x) - math.log(255)).flatten(1).sum(1)


class Gaussian(_Density):
    """Mean and standard deviation `sigma`: a scalar tensor, or one for each value."""

    name = "gaussian"

    def __init__(self, output: Tensor, sigma: Tensor) -> None:
        super().__init__(output)
        self.sigma = sigma.to(self.output.dtype)

    def log_prob_values(self, x: Tensor) -> Tensor:
        error = (x - self.location) / self.sigma
        return -0.5 * error.square() - self.sigma.log() - 0.5 * math.log(2 * math.pi)

    def sample(self, noise: Tensor) -> Tensor:
        """(B, C, H, W) clamped to [0, 1], from uniform noise on [0, 1)."""
        standard = math.sqrt(2) * torch.erfinv(2 * clamp_to_open_interval(noise, self.output.dtype) - 1)
        return (self.location + self.sigma * standard).clamp(0, 1)


class Laplace(_Density):
    """Mean and one `scale` b (a scalar tensor): log p = -|x - m| / b - log 2b."""

    name = "laplace"

    def __init__(self, output: Tensor, scale: Tensor) -> None:
        super().__init__(output)
        self.scale = scale.to(self.output.dtype)

    def log_prob_values(self, x: Tensor) -> Tensor:
        return -(x - self.location).abs() / self.scale - (2 * self.scale).log()

    def sample(self, noise: Tensor) -> Tensor:
        """(B, C, H, W) clamped to [0, 1], from uniform noise on [0, 1)."""
        centred = clamp_to_open_interval(noise, self.output.dtype) - 0.5
        standard = -centred.sign() * torch.log1p(-2 * centred.abs())
        return (self.location + self.scale * standard).clamp(0, 1)


class ObservationModel(nn.Module):
    """From the decoder's output to p(x | z); holds the sigmas and scales that are measured on the data or trained.

    Args:
        config: The job's `likelihood` section.
        spec: What the images look like.
    """

    scale: Tensor
    steps: Tensor

    def __init__(self, config: LikelihoodConfig, spec: Spec) -> None:
        super().__init__()
        self.config, self.channels = config, spec.channels
        sigma = config.sigma if isinstance(config, GaussianLikelihood) else None
        self.measured = sigma in ("data", "optimal")
        """Whether `prepare` needs batches."""
        self.batch_statistics = sigma == "optimal"
        """Whether the loss contains a statistic of the global batch."""
        self.outputs = spec.channels
        """Channels that the decoder emits."""
        if sigma == "predicted":
            self.outputs = 2 * spec.channels
        elif isinstance(config, LogisticLikelihood):
            self.outputs = config.outputs(spec.channels)
        scale = config.scale if isinstance(config, LaplaceLikelihood) else sigma
        # A number from the job file is not state: an override of it must win over a checkpoint's.
        number = scale if isinstance(scale, float) else 1.0
        self.register_buffer("scale", torch.tensor(number), persistent=self.measured)
        if sigma == "learned":
            self.raw_sigma = nn.Parameter(torch.zeros(()))
        if isinstance(config, LogisticLikelihood) and config.scale == "learned":
            self.raw_scale = nn.Parameter(torch.zeros(spec.channels))
        if sigma == "optimal":
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def prepare(self, first_batches: Sequence[Batch], ctx: Context) -> None:
        """Measure sigma = std of all values, for `sigma: data` and as the initial value of `optimal`."""
        if not self.measured:
            return
        first = second = 0.0
        for batch in first_batches:
            x = to_unit_range(batch.get("target", batch["image"]), torch.float64).flatten(1)
            first += float(ctx.mean(x.mean(1))) / len(first_batches)
            second += float(ctx.mean(x.square().mean(1))) / len(first_batches)
        # One grey level at least: constant images have no variance.
        self.scale.fill_(math.sqrt(max(second - first * first, 255.0**-2)))

    def forward(
        self, output: Tensor, image: Tensor | None = None, ctx: Context | None = None
    ) -> Bernoulli | Gaussian | Laplace | DiscretizedLogistic:
        """The likelihood of a batch of decoder outputs.

        Args:
            output: (B, `outputs`, H, W) of the decoder.
            image: (B, C, H, W) uint8 targets of `output`; with `ctx` needed in a model's `forward`, where
                `batch_statistics` are measured on them.
            ctx: Of the step.
        """
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if isinstance(self.config, BernoulliLikelihood):
            return Bernoulli(output)
        if isinstance(self.config, LaplaceLikelihood):
            return Laplace(output, self.scale)
        if isinstance(self.config, LogisticLikelihood):
            shared = self.raw_scale if self.config.scale == "learned" else None
            return DiscretizedLogistic.from_network(output, self.channels, self.config, shared)
        if self.config.sigma == "predicted":
            location, raw = output.chunk(2, dim=1)
            return Gaussian(location, _above_rounding(raw))
        if self.config.sigma == "learned":
            return Gaussian(output, _above_rounding(self.raw_sigma))
        if self.config.sigma == "optimal" and image is not None and ctx is not None and ctx.training:
            return Gaussian(output, self._optimal(output, image, ctx))
        return Gaussian(output, self.scale)

    def _optimal(self, output: Tensor, image: Tensor, ctx: Context) -> Tensor:
        """sigma of the global batch, with gradient; every row has the same weight."""
        error = Gaussian(output, self.scale).squared_error(image)
        values = torch.full_like(error, output[0].numel())
        statistics = torch.stack([error, values], 1).double().sum(0)
        ctx.accumulate("squared error", statistics)
        total, count = ctx.sum(statistics).unbind()
        return (total / count + ROUNDING**2).sqrt()

    def after_step(self, ctx: Context) -> dict[str, Tensor]:
        """Update the running mean of the optimal sigma; returns a learned or optimal sigma."""
        if not isinstance(self.config, GaussianLikelihood):
            return {}
        if self.config.sigma == "learned":
            return {"sigma": _above_rounding(self.raw_sigma)}
        if self.config.sigma != "optimal":
            return {}
        total, count = ctx.total("squared error").unbind()
        steps = int(self.steps)
        decay = min(_DECAY, (1 + steps) / (10 + steps))  # smaller at first, to forget the first steps faster
        variance = decay * self.scale.double() ** 2 + (1 - decay) * (total / count + ROUNDING**2)
        self.scale.copy_(variance.sqrt())
        self.steps += 1
        return {"sigma": self.scale}


def _above_rounding(raw: Tensor) -> Tensor:
    """Any real number to a sigma above ROUNDING; 0 gives about _START, and far above it sigma = _START e^raw."""
    floor = math.log(ROUNDING)
    return (floor + functional.softplus(raw + math.log(_START) - floor)).exp()


def check_dssim(weight: float, spec: Spec) -> None:
    """Refuse a dssim weight where the images are smaller than SSIM's window.

    Raises:
        UserError: naming the smallest side that works.
    """
    if weight > 0 and min(spec.shape) < WINDOW_SIDE["gaussian"]:
        raise UserError(
            f"model.dssim is {weight}, but SSIM needs images of at least {WINDOW_SIDE['gaussian']}x"
            f"{WINDOW_SIDE['gaussian']} and these are {'x'.join(map(str, spec.shape))}: set model.dssim=0"
        )
