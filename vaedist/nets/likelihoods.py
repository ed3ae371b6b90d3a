"""Likelihoods p(x | z): what the decoder's output says about an image.

A likelihood owns the target's scale. The network emits values that [-1, 1] reads as black to white; the image
is uint8; `mean` and `sample` are in [0, 1]. All of it runs in fp32 (fp64 for fp64 models) outside autocast and is
summed over the P = C*H*W values of an image, in nats.

| kind | log p(x), x in [0, 1], a = network output |
|---|---|
| `bernoulli` | sum of x log s(a) + (1 - x) log(1 - s(a)), s = sigmoid |
| `gaussian` | sum of log N(x; (a + 1) / 2, sigma^2): a density of the grey value, so it may be positive |
| `laplace` | sum of log Laplace(x; (a + 1) / 2, scale): the same for the absolute error |

`bernoulli` takes grey values as probabilities: it is the expected log-likelihood of their coin flips, and a true one
only for black-and-white images.

`sigma: data` takes sigma^2 = the variance of the training images' values around their mean, measured once before
step 1 and kept with the weights; it is the "normalised" squared error of the VQ-VAE paper (van den Oord et al.,
"Neural discrete representation learning").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from vaedist.config import OVERRIDE, Spec, Strict
from vaedist.context import Batch, Context
from vaedist.errors import UserError
from vaedist.nets.ssim import SIDE, ssim


class BernoulliLikelihood(Strict):
    """Each value is a coin flip."""

    kind: Literal["bernoulli"] = "bernoulli"


class GaussianLikelihood(Strict):
    """Squared error."""

    kind: Literal["gaussian"] = "gaussian"
    sigma: Annotated[float, Field(gt=0)] | Literal["data"] = Field(
        "data",
        description="Standard deviation on the [0, 1] scale, or `data`: that of the training images.",
        json_schema_extra=OVERRIDE,
    )


class LaplaceLikelihood(Strict):
    """Absolute error."""

    kind: Literal["laplace"] = "laplace"
    scale: float = Field(
        0.1, gt=0, description="Mean absolute deviation on the [0, 1] scale.", json_schema_extra=OVERRIDE
    )


LikelihoodConfig = Annotated[
    BernoulliLikelihood | GaussianLikelihood | LaplaceLikelihood, Field(discriminator="kind")
]


def unit(image: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [0, 255] to [0, 1]."""
    return image.to(dtype) / 255


class _Decoded:
    """A batch of decoded images: `output` (B, C, H, W) of the network, in at least fp32."""

    def __init__(self, output: Tensor) -> None:
        self.output = output.to(torch.promote_types(output.dtype, torch.float32))

    @property
    def location(self) -> Tensor:
        """(B, C, H, W): the mean before it is cut to [0, 1]."""
        return (self.output + 1) / 2

    @property
    def mean(self) -> Tensor:
        """(B, C, H, W) in [0, 1]."""
        return self.location.clamp(0, 1)

    def target(self, image: Tensor) -> Tensor:
        assert image.dtype == torch.uint8 and image.shape == self.output.shape
        return unit(image, self.output.dtype)

    def values(self, x: Tensor) -> Tensor:
        """log p of each value of x in [0, 1]."""
        raise NotImplementedError

    def log_prob(self, image: Tensor) -> Tensor:
        """(B,) nats for uint8 images (B, C, H, W), summed over pixels."""
        with torch.autocast(image.device.type, enabled=False):
            return self.values(self.target(image)).flatten(1).sum(1)

    def mse(self, image: Tensor) -> Tensor:
        """(B,) squared error of `mean` per value, on the [0, 1] scale."""
        return (self.mean - self.target(image)).square().flatten(1).mean(1)

    def dssim(self, image: Tensor) -> Tensor:
        """(B,) structural dissimilarity P * (1 - SSIM) / 2: a number per image that grows as nats do.

        Of `mean`, which is what gets looked at: values beyond black or white count as black or white. Their
        gradient is left to `log_prob`.
        """
        similarity = ssim(self.mean, self.target(image))
        return self.output.shape[1:].numel() * (1 - similarity) / 2


class Bernoulli(_Decoded):
    """Logits."""

    @property
    def location(self) -> Tensor:
        return torch.sigmoid(self.output)

    def values(self, x: Tensor) -> Tensor:
        return -functional.binary_cross_entropy_with_logits(self.output, x, reduction="none")

    def sample(self, noise: Tensor) -> Tensor:
        """(B, C, H, W) of 0 and 1, from uniform noise on [0, 1)."""
        return (noise < self.mean).to(self.output.dtype)


class Gaussian(_Decoded):
    """Mean and one standard deviation `sigma` (a scalar tensor)."""

    def __init__(self, output: Tensor, sigma: Tensor) -> None:
        super().__init__(output)
        self.sigma = sigma.to(self.output.dtype)

    def values(self, x: Tensor) -> Tensor:
        error = (x - self.location) / self.sigma
        return -0.5 * error.square() - self.sigma.log() - 0.5 * math.log(2 * math.pi)

    def sample(self, noise: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1], values beyond cut, from uniform noise on [0, 1)."""
        standard = math.sqrt(2) * torch.erfinv(2 * _open(noise, self.output.dtype) - 1)
        return (self.location + self.sigma * standard).clamp(0, 1)


class Laplace(_Decoded):
    """Mean and one `scale` b (a scalar tensor): log p = -|x - m| / b - log 2b."""

    def __init__(self, output: Tensor, scale: Tensor) -> None:
        super().__init__(output)
        self.scale = scale.to(self.output.dtype)

    def values(self, x: Tensor) -> Tensor:
        return -(x - self.location).abs() / self.scale - (2 * self.scale).log()

    def sample(self, noise: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1], values beyond cut, from uniform noise on [0, 1)."""
        centred = _open(noise, self.output.dtype) - 0.5
        standard = -centred.sign() * torch.log1p(-2 * centred.abs())
        return (self.location + self.scale * standard).clamp(0, 1)


def _open(noise: Tensor, dtype: torch.dtype) -> Tensor:
    """Uniform noise moved off 0 and 1, where inverse distribution functions are infinite."""
    edge = torch.finfo(dtype).eps
    return noise.to(dtype).clamp(edge, 1 - edge)


class Observation(nn.Module):
    """Network output to likelihood object; holds what is measured on the data."""

    scale: Tensor

    def __init__(self, config: BernoulliLikelihood | GaussianLikelihood | LaplaceLikelihood) -> None:
        super().__init__()
        self.config = config
        start = 1.0
        if isinstance(config, GaussianLikelihood) and not isinstance(config.sigma, str):
            start = config.sigma
        if isinstance(config, LaplaceLikelihood):
            start = config.scale
        # A number from the job file is not state: an overridden one must win over a checkpoint's.
        self.measured = isinstance(config, GaussianLikelihood) and config.sigma == "data"
        self.register_buffer("scale", torch.tensor(start), persistent=self.measured)

    def prepare(self, first_batches: Sequence[Batch], ctx: Context) -> None:
        """Measure sigma = std of all values, where the job says `sigma: data`."""
        if not self.measured:
            return
        first = torch.zeros((), dtype=torch.float64)
        second = torch.zeros((), dtype=torch.float64)
        for batch in first_batches:
            x = unit(batch["image"], torch.float64).flatten(1)
            first += ctx.mean(x.mean(1)).cpu() / len(first_batches)
            second += ctx.mean(x.square().mean(1)).cpu() / len(first_batches)
        # One grey level at least: constant images have no variance.
        self.scale.fill_(math.sqrt(max(float(second - first**2), 255.0**-2)))

    def forward(self, output: Tensor) -> Bernoulli | Gaussian | Laplace:
        if isinstance(self.config, BernoulliLikelihood):
            return Bernoulli(output)
        if isinstance(self.config, GaussianLikelihood):
            return Gaussian(output, self.scale)
        return Laplace(output, self.scale)


def check_dssim(weight: float, spec: Spec) -> None:
    """Refuse a dssim weight where the images are smaller than SSIM's window.

    Raises:
        UserError: naming the smallest side that works.
    """
    if weight > 0 and min(spec.height, spec.width) < SIDE["gaussian"]:
        raise UserError(
            f"model.dssim is {weight}, but SSIM needs images of at least {SIDE['gaussian']}x"
            f"{SIDE['gaussian']} and these are {spec.height}x{spec.width}: set model.dssim=0"
        )
