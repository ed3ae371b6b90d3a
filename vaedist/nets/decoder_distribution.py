"""The base of the likelihoods: p(x | z) of a batch of decoded images, with mean, errors and log-probability."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from vaedist.nets.ssim import ssim

Evidence = Literal["discrete", "binary", "density", "surrogate"]


def to_unit_range(image: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [0, 255] to [0, 1]."""
    return image.to(dtype) / 255


def clamp_to_open_interval(noise: Tensor, dtype: torch.dtype) -> Tensor:
    """Uniform noise without 0 and 1, where inverse distribution functions are infinite."""
    eps = torch.finfo(dtype).eps
    return noise.to(dtype).clamp(eps, 1 - eps)


class DecoderDistribution:
    """p(x | z) of a batch, from the `output` (B, C, H, W) of the decoder, in at least fp32."""

    evidence: ClassVar[Evidence]
    """What `log_prob` is: see `vaedist.nets.likelihoods`."""
    name: ClassVar[str]
    """As metrics.json writes it."""

    def __init__(self, output: Tensor) -> None:
        self.output = output.to(torch.promote_types(output.dtype, torch.float32))

    @property
    def location(self) -> Tensor:
        """(B, C, H, W): the mean before it is clamped to [0, 1]."""
        return (self.output + 1) / 2

    @property
    def mean(self) -> Tensor:
        """(B, C, H, W) in [0, 1]."""
        return self.location.clamp(0, 1)

    def target(self, image: Tensor) -> Tensor:
        """uint8 images on the [0, 1] scale."""
        assert image.dtype == torch.uint8 and image.shape == self.output.shape
        return to_unit_range(image, self.output.dtype)

    def log_prob_values(self, x: Tensor) -> Tensor:
        """log p of each value of x in [0, 1], or of each pixel where its channels depend on each other."""
        raise NotImplementedError

    def sample(self, noise: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1], from uniform noise on [0, 1) of the same shape."""
        raise NotImplementedError

    def log_prob(self, image: Tensor) -> Tensor:
        """(B,) nats for uint8 images (B, C, H, W), summed over pixels."""
        with torch.autocast(image.device.type, enabled=False):
            return self.log_prob_values(self.target(image)).flatten(1).sum(1)

    def squared_error(self, image: Tensor) -> Tensor:
        """(B,) sum of squared distances from `location`, on the [0, 1] scale; values beyond it are not clamped."""
        return (self.location - self.target(image)).square().flatten(1).sum(1)

    def mse(self, image: Tensor) -> Tensor:
        """(B,) squared error of `mean` per value, on the [0, 1] scale."""
        return (self.mean - self.target(image)).square().flatten(1).mean(1)

    def dssim(self, image: Tensor) -> Tensor:
        """(B,) structural dissimilarity P * (1 - SSIM) / 2, which scales with the number of values as nats do.

        Of `mean`, which people look at: values beyond black or white count as black or white and have no gradient
        here, only in `log_prob`.
        """
        similarity = ssim(self.mean, self.target(image))
        return self.output.shape[1:].numel() * (1 - similarity) / 2
